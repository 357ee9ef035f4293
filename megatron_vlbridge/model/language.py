"""The language model, composed of Megatron's blocks: interleaved MRoPE, deepstack and multi-token prediction."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.call.head import OutputProcessor
from megatron_vlbridge.model.deepstack import DeepstackLayer, DeepstackSegments, append_features
from megatron_vlbridge.model.inputs.mtp import MtpInputs
from megatron_vlbridge.model.mtp import MtpBlock, MtpLayer, check_embedding_group, with_mtp_loss
from megatron_vlbridge.model.rope import inverse_frequencies, mrope_axes, rotary_table
from megatron_vlbridge.model.specs import block_spec, layer_spec


class LanguageModel(LanguageModule):
    """A pipeline stage's part of the language model: embedding, decoder layers, MTP layer and head.

    Modules have the names that Megatron's `GPTModel` gives them, so checkpoints hold the same keys. `LanguageModule`
    ties and marks the copies of the embedding by the attributes `pre_process`, `post_process`, `mtp_process`,
    `vp_stage` and `share_embeddings_and_output_weights`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Config,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
        vocab_size: int,
        pre_process: bool,
        post_process: bool,
        parallel_output: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.text = hf_config.text
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.mtp_process = bool(config.mtp_num_layers) and mtp_on_this_rank(
            config.pipeline_model_parallel_layout, config.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
        )
        if config.mtp_num_layers and config.pipeline_model_parallel_size > 1:
            check_embedding_group(config, hf_config.tie_word_embeddings, pg_collection)
        holds_embedding = pre_process or self.mtp_process
        if holds_embedding:
            self._add_embedding(vocab_size)
        self.decoder = TransformerBlock(
            config,
            block_spec(backend, config, _layer_specs(config, hf_config, backend, pg_collection, vp_stage)),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if self.mtp_process:
            kind = hf_config.text.mtp_layer_kind
            self.mtp = MtpBlock(config, MtpLayer(config, backend, pg_collection, vp_stage, kind))
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=not parallel_output,
                # A stage that holds the tied embedding uses it as the head.
                skip_weight_param_allocation=hf_config.tie_word_embeddings and holds_embedding,
                tp_group=pg_collection.tp,
            )
        if holds_embedding or post_process:
            self.setup_embeddings_and_output_layer()

    def _add_embedding(self, vocab_size: int) -> None:
        self.embedding = LanguageModelEmbedding(
            self.config,
            vocab_size,
            self.text.max_position_embeddings,
            position_embedding_type="none",
            # Image features replace rows of the whole embeddings, which are scattered afterwards.
            scatter_to_sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )
        if self.text.pad_token_id is not None:
            self.embedding.register_forward_hook(self._without_pad_gradient, with_kwargs=True)

    def _without_pad_gradient(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], words: torch.Tensor
    ) -> torch.Tensor:
        """The embeddings `[s, b, H]`, of which the pad token's get no gradient (torch's `padding_idx`)."""
        pad = (kwargs["input_ids"] == self.text.pad_token_id).T[..., None]
        return torch.where(pad, words.detach(), words)

    def forward(
        self,
        embeddings: torch.Tensor | None,
        position_ids: torch.Tensor,
        packed: DeepstackSegments,
        deepstack: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mtp: MtpInputs | None = None,
        output_processor: OutputProcessor | None = None,
        logits_with_labels: bool = False,
    ) -> Any:
        """Logits `[1, T, V / tp]`, or the loss `[1, T]` of each of the `labels`; hidden states on earlier stages.

        With an `output_processor`, what it makes of the hidden states; `logits_with_labels`: labels are for the MTP
        loss alone.

        `embeddings` `[s, 1, H]` (first stage only, else what `decoder.set_input_tensor` was given), `position_ids`
        `[3, 1, T]` (time, row, column), `deepstack` `[levels, n, 1, H]`, `padding_mask` `[1, s]`. On earlier stages
        the deepstack features of later ones follow the hidden states.
        """
        if self.config.mtp_num_layers and mtp is None:
            raise VLBridgeError(
                "the MTP layer needs the next token of each token, which these inputs do not have: a pack that was "
                "split among the context-parallel ranks beforehand is not supported with it. Give whole packs"
            )
        table = self.rotary_table(position_ids)
        hidden_states = self.decoder(
            embeddings,
            attention_mask=None,
            context=deepstack,
            rotary_pos_emb=table,
            packed_seq_params=packed,
            padding_mask=padding_mask,
        )
        if mtp is not None and self.mtp_process:
            next_words = self.scatter(self.embedding(input_ids=mtp.tokens, position_ids=None))
            hidden_states = self.mtp(next_words, hidden_states, table, packed, padding_mask)
        if not self.post_process:
            return append_features(hidden_states, deepstack, len(self.decoder.layers))
        if mtp is not None:
            if labels is not None:
                hidden_states = with_mtp_loss(self, hidden_states, mtp)
            hidden_states = hidden_states.chunk(2)[0]
        if output_processor is not None:
            return output_processor.run(self, hidden_states)
        logits = self.logits(hidden_states)
        if labels is None or logits_with_labels:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def rotary_table(self, position_ids: torch.Tensor) -> torch.Tensor:
        """What the decoder gets as `rotary_pos_emb` for `position_ids` `[3, 1, T]`."""
        frequencies = inverse_frequencies(self.text.rotary_dim // 2, self.text.rope_theta, position_ids.device)
        return rotary_table(position_ids[:, 0], mrope_axes(self.text.mrope_section), frequencies)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[s, 1, H]` -> `[T, 1, V / tp]`."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output, _ = self.output_layer(hidden_states, weight=tied)
        return output

    def scatter(self, embeddings: torch.Tensor) -> torch.Tensor:
        """`[T, 1, H]` -> this rank's part under sequence parallelism, else unchanged."""
        if not self.config.sequence_parallel:
            return embeddings
        return scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)

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


def _layer_specs(
    config: TransformerConfig,
    hf_config: Config,
    backend: BackendSpecProvider,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None,
) -> list[ModuleSpec]:
    """The specs of this stage's decoder layers."""
    pp_rank, kinds = pg_collection.pp.rank(), hf_config.text.layer_kinds
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    levels = len(hf_config.vision.deepstack_visual_indexes)
    specs = (
        layer_spec(backend, config, AttnMaskType.causal, kinds[index], layer=DeepstackLayer)
        for index in range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    )
    return [replace(spec, params={"levels": levels}) for spec in specs]
