"""Multi-token prediction: a layer behind the decoder that predicts the token after the next one.

Its input is a projection of the normed embedding of the next token (of a placeholder its own embedding, not the
picture's features) and the normed output of the decoder; it attends inside segments, with the positions of the tokens
themselves. Its output is normed and goes through the model's head. Written for Megatron-Core 0.19.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    _compute_mtp_acceptance_counts,
    get_mtp_ranks,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.mtp_inputs import MtpInputs
from megatron_vlbridge.model.specs import layer_spec


class PredictionLayer(MultiTokenPredictionLayer):
    """Megatron's prediction layer, which is handed the next tokens instead of the tokens.

    Megatron moves the tokens of each segment by one itself, with a wait for the device and messages between the
    context-parallel ranks for every segment.
    """

    def _get_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        embedding: Any,
        hidden_states: torch.Tensor,
        packed_seq_params: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The embeddings of `input_ids`, the next tokens; everything else unchanged."""
        words = embedding(input_ids=input_ids, position_ids=position_ids)
        if self.sequence_parallel:
            # The model's embedding leaves this to its caller.
            words = scatter_to_sequence_parallel_region(words, group=self.tp_group)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        if not hidden_states.requires_grad:
            # Behind a frozen decoder; recomputed layers get gradients only if their input asks for one.
            hidden_states = hidden_states.detach().requires_grad_()
        return input_ids, position_ids, padding_mask, words, hidden_states


def prediction_spec(
    backend: BackendSpecProvider, config: TransformerConfig, checkpoint: Config
) -> MultiTokenPredictionBlockSubmodules | None:
    """The block of prediction layers with the kernels of `backend`, None where the checkpoint has none."""
    if not checkpoint.text.num_mtp_layers:
        return None
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        layer_norm=norm,
        eh_proj=backend.column_parallel_linear(),
        mtp_model_layer=layer_spec(backend, config, AttnMaskType.causal, experts=checkpoint.text.moe is not None),
    )
    layer = ModuleSpec(module=PredictionLayer, submodules=submodules)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * checkpoint.text.num_mtp_layers)


def embedding_ranks(pp_ranks: list[int], config: TransformerConfig, tied: bool) -> list[int]:
    """Of the ranks of a pipeline those that hold the word embedding: Megatron's `get_embedding_ranks`.

    These are the first, the one with the prediction layer, and the last where both ends of the model are `tied`.
    Megatron's default is the first and the last, which are others where the prediction layer has a stage of its own.

    Example:
        >>> initialize_model_parallel(1, 4, get_embedding_ranks=lambda ranks: embedding_ranks(ranks, config, False))
    """
    last = [pp_ranks[-1]] if tied else []
    return sorted({pp_ranks[0], *last, *get_mtp_ranks(pp_ranks, config)})


class PredictingModel(GPTModel):
    """Megatron's `GPTModel`, whose prediction layer and its loss take :class:`MtpInputs` that came with the pack."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        tied = kwargs["share_embeddings_and_output_weights"]
        if config.mtp_num_layers and config.pipeline_model_parallel_size > 1:
            _check_embedding_group(config, tied, kwargs["pg_collection"])
        super().__init__(config, *args, **kwargs)
        if self.mtp_process and self.post_process and tied:
            # Megatron makes a head of its own here, which is never used, trained or filled: the head is the embedding.
            self.output_layer.weight = None

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Megatron's postprocessing; the keyword `output_processor_context` holds the :class:`MtpInputs`."""
        further: MtpInputs | None = kwargs.pop("output_processor_context")
        if not self.config.mtp_num_layers:
            return super()._postprocess(hidden_states, **kwargs)
        if further is None:
            raise VLBridgeError(
                "the prediction layer needs the next token of each token, which these inputs do not have: a row that "
                "was cut among the context-parallel ranks beforehand is not offered with it. Hand over whole rows"
            )
        if self.mtp_process:
            hidden_states = self.mtp(
                input_ids=further.tokens,
                position_ids=None,
                hidden_states=hidden_states,
                attention_mask=None,
                rotary_pos_emb=kwargs["rotary_pos_emb"],
                packed_seq_params=kwargs["packed_seq_params"],
                padding_mask=kwargs["padding_mask"],
                embedding=self.embedding,
            )
        labels = kwargs["labels"]
        if self.post_process and labels is not None:
            hidden_states = self._add_further_loss(hidden_states, further)
        # Without labels and tokens Megatron leaves out its own further loss, whose weight differs between the ranks.
        kwargs |= {"labels": None, "input_ids": None, "mtp_in_postprocess": False}
        output = super()._postprocess(hidden_states, **kwargs)
        if not self.post_process or labels is None:
            return output
        return self.compute_language_model_loss(labels, output.transpose(0, 1))

    def _add_further_loss(self, hidden_states: torch.Tensor, further: MtpInputs) -> torch.Tensor:
        """`hidden_states` `[2s, 1, H]` (the decoder's, then the prediction layer's), whose backward adds the loss."""
        assert further.labels is not None
        assert further.weights is not None
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states.chunk(2)[1], weight=weight)
        losses = self.compute_language_model_loss(further.labels, logits)
        if self.training:
            self._log(losses.detach(), logits, further)
        return MTPLossAutoScaler.apply(hidden_states, self.config.mtp_loss_scaling_factor * further.weights * losses)

    def _log(self, losses: torch.Tensor, logits: torch.Tensor, further: MtpInputs) -> None:
        """For Megatron's log: the mean loss of the pack, which Megatron averages over the data and context ranks."""
        assert further.labels is not None
        assert further.weights is not None
        mask = (further.weights > 0).float()
        mean = (losses * mask).sum() * self.cp_group.size() / max(further.supervised, 1)
        correct, total = _compute_mtp_acceptance_counts(
            logits, further.labels, mask, self.output_layer, None, self.tp_group
        )
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        MTPLossLoggingHelper.save_metrics_to_tracker(mean, correct, total, 0, 1, avg_group=group)


def _check_embedding_group(config: TransformerConfig, tied: bool, groups: ProcessGroupCollection) -> None:
    """Refuse a group that would not keep all copies of the embedding the same."""
    ranks = torch.distributed.get_process_group_ranks
    wanted = embedding_ranks(ranks(groups.pp), config, tied)
    found = [] if groups.embd is None else ranks(groups.embd)
    me = torch.distributed.get_rank()
    if wanted != sorted(found) if me in wanted else me in found:
        raise VLBridgeError(
            f"rank {me}: the ranks of its pipeline that hold the word embedding are {wanted}, but Megatron's embedding "
            f"group holds {sorted(found)}, so the copies would not stay the same. Give Megatron "
            "get_embedding_ranks=lambda ranks: embedding_ranks(ranks, config, tied) from megatron_vlbridge.model.mtp"
        )
