"""The language model: Megatron's GPT with interleaved MRoPE and deepstack."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.mtp import PredictingModel, prediction_spec
from megatron_vlbridge.model.rope import inverse_frequencies, mrope_axes, rotary_table
from megatron_vlbridge.model.specs import block_spec, layer_spec


class DeepstackLayer(TransformerLayer):
    """A decoder layer k < `levels` that adds deepstack features of level k to the picture tokens of its output.

    `context` `[rest, n, 1, H]` carries the features of the last `rest` levels through Megatron's block, which hands it
    from layer to layer and through activation recomputation; `PackedSegments.vision_rows` `[n]` says to which rows they
    belong. Megatron uses `context` for cross-attention, which this model has not.
    """

    def __init__(self, *args: Any, levels: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels = levels

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same as Megatron's, see there."""
        hidden_states, context = super().forward(*args, **kwargs)
        if context is not None and self.layer_number <= self.levels:
            features = context[self.layer_number - 1 - self.levels]
            hidden_states = hidden_states.index_add(0, kwargs["packed_seq_params"].vision_rows, features)
        return hidden_states, context


class LanguageModel(PredictingModel):
    """Megatron's `GPTModel` whose positions are `[3, 1, T]` (time, row, column) and whose layers take deepstack rows.

    All that depends on `GPTModel` stands in this class.
    """

    def __init__(
        self,
        config: TransformerConfig,
        checkpoint: Config,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
        vocab_size: int,
        pre_process: bool,
        post_process: bool,
        parallel_output: bool,
        vp_stage: int | None,
    ) -> None:
        pp_rank = pg_collection.pp.rank()
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        moe = checkpoint.text.moe
        levels = len(checkpoint.vision.deepstack_visual_indexes)
        layers = [
            replace(
                layer_spec(
                    backend,
                    config,
                    AttnMaskType.causal,
                    layer=DeepstackLayer,
                    experts=moe is not None and moe.is_moe_layer(number),
                ),
                params={"levels": levels},
            )
            for number in range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
        ]
        super().__init__(
            config,
            block_spec(backend, config, layers),
            vocab_size=vocab_size,
            max_sequence_length=checkpoint.text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=checkpoint.tie_word_embeddings,
            position_embedding_type="none",
            # Pictures are put into the whole embeddings, which are scattered afterwards.
            scatter_embedding_sequence_parallel=False,
            mtp_block_spec=prediction_spec(backend, config, checkpoint),
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.text = checkpoint.text
        if self.text.pad_token_id is not None and hasattr(self, "embedding"):
            self.embedding.register_forward_hook(self._without_pad_gradient, with_kwargs=True)

    def _without_pad_gradient(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], words: torch.Tensor
    ) -> torch.Tensor:
        """The embeddings `[s, b, H]`, of which the pad token's get no gradient (torch's `padding_idx`)."""
        pad = (kwargs["input_ids"] == self.text.pad_token_id).T[..., None]
        return torch.where(pad, words.detach(), words)

    def _preprocess(self, input_ids: Any, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Megatron's preprocessing with the rotary table of these positions (Megatron-Core 0.19: second in the row)."""
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        frequencies = inverse_frequencies(self.text.head_dim // 2, self.text.rope_theta, position_ids.device)
        table = rotary_table(position_ids[:, 0], mrope_axes(self.text.mrope_section), frequencies)
        return (decoder_input, table, *rest)

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Megatron's postprocessing; deepstack features that later layers take go on behind the hidden states."""
        context = (kwargs.pop("extra_block_kwargs") or {}).get("context")
        output = super()._postprocess(hidden_states, **kwargs)
        rest = None if context is None else context[len(self.decoder.layers) :]
        return output if rest is None or not len(rest) else torch.cat((output, rest.flatten(0, 1)))

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Megatron's loss `[b, s]` of `logits` `[s, b, V / tp]`, without the columns that only pad the vocabulary.

        Megatron-Core counts them in the softmax, so the loss would depend on the tensor-parallel size.
        """
        if not self.parallel_output and self.pg_collection.tp.size() > 1:
            raise VLBridgeError(
                "labels with parallel_output=False: the loss takes logits that are split over the tensor-parallel "
                "ranks, found whole ones. Build the model with parallel_output=True to train it"
            )
        columns = logits.shape[-1]
        first = self.pg_collection.tp.rank() * columns
        padding = first + columns - max(self.text.vocab_size, first)
        if padding > 0:
            logits[..., columns - padding :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
