"""Multi-token prediction (MTP): a layer after the decoder that predicts the token after the next one.

The MTP layer projects the normed embedding of the next token (of an image token the placeholder's embedding, not the
image's features) beside the normed output of the decoder, and runs one decoder layer on it, with the positions of the
tokens themselves. Its normed output goes through the model's head. Source: DeepSeek-V3 (arXiv 2412.19437), 2.2.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper, get_mtp_ranks
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import LayerKind
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs.mtp import MtpInputs
from megatron_vlbridge.model.recompute import recomputable
from megatron_vlbridge.model.specs import layer_spec


class MtpBlock(MegatronModule):
    """The MTP layer as `layers.0`, the name that Megatron's `MultiTokenPredictionBlock` gives it."""

    def __init__(self, config: TransformerConfig, layer: "MtpLayer") -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, next_words: torch.Tensor, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        """`[2s, 1, H]`: the decoder's hidden states, then the MTP layer's; arguments as for :class:`MtpLayer`."""
        layer: Any = self.layers[0]
        # A view of its own has the layer's gradients summed before the decoder's are added, as in Megatron's block.
        return torch.cat((hidden_states, layer(next_words, hidden_states.view_as(hidden_states), *args)))

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The layer's entries, its decoder layer under Megatron's storage name `transformer_layer`."""
        layer: Any = self.layers[0]
        prefix += "layers.0."
        entries = layer.sharded_state_dict(prefix, *args, **kwargs)
        apply_prefix_mapping(entries, {f"{prefix}mtp_model_layer.": f"{prefix}transformer_layer."})
        return entries


class MtpLayer(MegatronModule):
    """A projection of the next token's embedding beside the decoder's output, and one decoder layer.

    The next tokens come with the pack. Megatron's own layer shifts the tokens of every segment on the device, with a
    host sync and messages between context-parallel ranks for each.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
        kind: LayerKind,
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        norm = partial(
            backend.layer_norm(rms_norm=config.normalization == "RMSNorm"),
            config=config,
            hidden_size=config.hidden_size,
            eps=config.layernorm_epsilon,
        )
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = backend.column_parallel_linear()(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="mtp_eh_proj",
            tp_group=pg_collection.tp,
        )
        self.mtp_model_layer = build_module(
            layer_spec(backend, config, AttnMaskType.causal, kind),
            config=config,
            vp_stage=vp_stage,
            layer_number=1,
            is_mtp_layer=True,
            pg_collection=pg_collection,
        )
        self.final_layernorm = norm()

    def forward(
        self,
        next_words: torch.Tensor,
        hidden_states: torch.Tensor,
        rotary_table: torch.Tensor,
        packed: PackedSeqParams,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`next_words` `[s, 1, H]` (embeddings of the next tokens) and the decoder's `hidden_states` -> `[s, 1, H]`."""
        tensors = (next_words, recomputable(hidden_states, self), rotary_table, padding_mask)
        # The method "block" counts the decoder's layers only.
        recomputed = self.config.recompute_granularity == "full" and self.config.recompute_method == "uniform"
        if recomputed and self.training:
            return checkpoint(partial(self._run, packed), self.config.distribute_saved_activations, *tensors)
        return self._run(packed, *tensors)

    def _run(
        self,
        packed: PackedSeqParams,
        next_words: torch.Tensor,
        hidden_states: torch.Tensor,
        rotary_table: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        joined, _ = self.eh_proj(torch.cat((self.enorm(next_words), self.hnorm(hidden_states)), dim=-1))
        joined = gather_from_tensor_model_parallel_region(joined, group=self.tp_group)
        if self.config.sequence_parallel:
            joined = scatter_to_sequence_parallel_region(joined, group=self.tp_group)
        output, _ = self.mtp_model_layer(
            hidden_states=joined,
            attention_mask=None,
            rotary_pos_emb=rotary_table,
            packed_seq_params=packed,
            padding_mask=padding_mask,
        )
        return self.final_layernorm(output)


def with_mtp_loss(model: LanguageModule, hidden_states: torch.Tensor, mtp: MtpInputs) -> torch.Tensor:
    """`hidden_states` `[2s, 1, H]` of :class:`MtpBlock`, whose backward also runs that of the MTP layer's loss."""
    assert mtp.labels is not None
    assert mtp.weights is not None
    logits = model.logits(hidden_states.chunk(2)[1])
    losses = model.compute_language_model_loss(mtp.labels, logits)
    if model.training:
        _log(model, losses.detach(), logits.detach(), mtp)
    return MTPLossAutoScaler.apply(hidden_states, model.config.mtp_loss_scaling_factor * mtp.weights * losses)


def _log(model: LanguageModule, losses: torch.Tensor, logits: torch.Tensor, mtp: MtpInputs) -> None:
    """For Megatron's log: the mean loss of the pack, which Megatron averages over the data and context ranks."""
    assert mtp.labels is not None
    assert mtp.weights is not None
    mask = mtp.weights > 0
    mean = (losses * mask).sum() * model.cp_group.size() / max(mtp.supervised, 1)
    correct = ((mtp.labels == _largest(logits, model.tp_group).T) & mask).sum()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    MTPLossLoggingHelper.save_metrics_to_tracker(mean, correct, mask.sum(), 0, 1, avg_group=group)


def _largest(logits: torch.Tensor, tp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The token id with the largest of the logits `[T, 1, V / tp]`, the lowest of equals: int64 `[T, 1]`."""
    mine, index = logits.max(dim=-1)
    best = mine.clone()
    torch.distributed.all_reduce(best, op=torch.distributed.ReduceOp.MAX, group=tp_group)
    columns = logits.shape[-1]
    index = (index + tp_group.rank() * columns).masked_fill(mine != best, tp_group.size() * columns)
    torch.distributed.all_reduce(index, op=torch.distributed.ReduceOp.MIN, group=tp_group)
    return index


def embedding_ranks(pp_ranks: list[int], config: TransformerConfig, tied: bool) -> list[int]:
    """Of the ranks of a pipeline those that hold the word embedding: Megatron's `get_embedding_ranks`.

    These are the first, the one with the MTP layer, and the last where both ends of the model are `tied`.
    Megatron's default is the first and the last, which are others where the MTP layer has a stage of its own.

    Example: `initialize_model_parallel(1, 4, get_embedding_ranks=lambda ranks: embedding_ranks(ranks, config, False))`.
    """
    last = [pp_ranks[-1]] if tied else []
    return sorted({pp_ranks[0], *last, *get_mtp_ranks(pp_ranks, config)})


def check_embedding_group(config: TransformerConfig, tied: bool, groups: ProcessGroupCollection) -> None:
    """Reject a group that would not keep all copies of the embedding the same (VLBridgeError)."""
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
