"""The language model: Megatron's GPT with interleaved MRoPE and deepstack."""

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from megatron_vlbridge.config import Config
from megatron_vlbridge.model.rope import inverse_frequencies, mrope_axes, rotary_table
from megatron_vlbridge.model.specs import block_spec, layer_spec


class DeepstackLayer(TransformerLayer):
    """A decoder layer k that adds `context[k]` to its output, where `context` holds a row for it.

    `context` `[levels, s, 1, H]` carries the deepstack features through Megatron's block, which hands it from layer to
    layer and through activation recomputation. Megatron uses it for cross-attention, which this model has not.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same as Megatron's, see there."""
        hidden_states, context = super().forward(*args, **kwargs)
        level = self.layer_number - 1
        if context is not None and level < context.shape[0]:
            hidden_states = hidden_states + context[level]
        return hidden_states, context


class LanguageModel(GPTModel):
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
        layers = [
            layer_spec(
                backend,
                config,
                AttnMaskType.causal,
                layer=DeepstackLayer,
                experts=moe is not None and moe.is_moe_layer(number),
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
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.text = checkpoint.text

    def _preprocess(self, input_ids: Any, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Megatron's preprocessing with the rotary table of these positions (Megatron-Core 0.19: second in the row)."""
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        frequencies = inverse_frequencies(self.text.head_dim // 2, self.text.rope_theta, position_ids.device)
        table = rotary_table(position_ids[:, 0], mrope_axes(self.text.mrope_section), frequencies)
        return (decoder_input, table, *rest)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Megatron's loss `[b, s]` of `logits` `[s, b, V / tp]`, without the columns that only pad the vocabulary.

        Megatron-Core counts them in the softmax, so the loss would depend on the tensor-parallel size.
        """
        columns = logits.shape[-1]
        first = self.pg_collection.tp.rank() * columns
        padding = first + columns - max(self.text.vocab_size, first)
        if padding > 0:
            logits[..., columns - padding :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
