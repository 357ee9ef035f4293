"""The vision-language model on Megatron-Core."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_vlbridge.backends.select import spec_provider
from megatron_vlbridge.config import Config
from megatron_vlbridge.model import deepstack
from megatron_vlbridge.model.call.build import OutputForm, RawBatch, build_inputs, check_pack
from megatron_vlbridge.model.call.head import OutputProcessor
from megatron_vlbridge.model.call.keywords import check_keywords
from megatron_vlbridge.model.call.stage import Stage
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.language import LanguageModel
from megatron_vlbridge.model.lora.state import AdapterState
from megatron_vlbridge.model.recompute import recomputable
from megatron_vlbridge.model.router import balancing_types
from megatron_vlbridge.model.transformer_config import vision_config
from megatron_vlbridge.model.vision.balance import tower_features
from megatron_vlbridge.model.vision.tower import VisionModel


class Qwen3VLModel(AdapterState, Stage):
    """A pipeline stage of the model of any family: vision tower and embeddings first, the head last.

    Args:
        config: the language model's `TransformerConfig` (`language_config(hf_config, ...)`).
        hf_config: the config of the checkpoint (`read_config(folder)`).
        vocab_size: the padded vocabulary size (default: the checkpoint's).
        pre_process, post_process, vp_stage: this stage's part, as Megatron's pretrain passes them.
        balance_vision: partition the vision frames over the context-parallel ranks; else each rank runs all of them.
        seq_length: the length of every pack where stages or the all-gather dispatcher need one size; only checked.
        parallel_output: leave the logits split over the tensor-parallel ranks.
        backend: which kernels (default: the CPU backend after `cpu_runtime.enable()`, else Transformer Engine).

    Example: `model = Qwen3VLModel(language_config(hf_config), hf_config)`, then `load_hf_weights(model, folder)`; its
    logits are `model(**processor(text=[text], images=[image], return_tensors="pt"))`.
    """

    check_position_ids = False
    """Whether positions that are given must equal the computed ones; to debug a data loader or a framework."""
    media_guard: Any = None
    """What `training.media_guard` knows of this stage."""
    layout_checked = False
    """Whether `training.guards.check_layout` has accepted the parallel layout and settings of `config`."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Config,
        *,
        vocab_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        parallel_output: bool = True,
        balance_vision: bool = True,
        seq_length: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: BackendSpecProvider | None = None,
    ) -> None:
        super().__init__(config)
        backend = backend or spec_provider()
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.hf_config = hf_config
        first_layer = get_transformer_layer_offset(config, vp_stage, self.pg_collection.pp.rank())
        # Of the deepstack features, those that this stage and later ones add.
        self._remaining_levels = max(0, len(hf_config.vision.deepstack_visual_indexes) - first_layer)
        self.balance_vision, self.seq_length = balance_vision, seq_length
        # Megatron's schedules, DDP and gradient finalisation look for these names.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.language_model = LanguageModel(
            config,
            hf_config,
            backend,
            self.pg_collection,
            vocab_size=vocab_size or hf_config.text.vocab_size,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            vp_stage=vp_stage,
        )
        deepstack.check_stages(config, hf_config)
        if pre_process:
            self.vision_model = VisionModel(vision_config(hf_config, config), hf_config, backend, self.pg_collection)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs: PackedInputs | None = None,
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        lengths: Sequence[int] | torch.Tensor | None = None,
        output_processor: Callable[..., Any] | None = None,
        output_processor_context: Any = None,
        **others: Any,
    ) -> Any:
        """Logits, or losses of tokens where there are labels, or what `output_processor` gives (called as by Megatron).

        A batch comes in one of these forms, on any device, all its media on every rank (later pipeline stages only need
        the grids). V is the padded vocabulary, divided by the tensor-parallel size with `parallel_output`.

        - padded: `input_ids`, `attention_mask`, `labels` `[B, S]` -> `[B, S, V]` or `[B, S]`; under context parallelism
          this rank's zigzag part of each row. The mask is 1 or True at text, or Megatron's `[B, 1, 1, S]`, True at
          padding. `mm_token_type_ids` `[B, S]` (1 image, 2 video) is only checked.
        - packed: `[1, T]` with Megatron's `packed_seq_params`, or `cu_seqlens` of the whole pack, padding included, and
          `lengths` without it -> `[1, T, V]` or `[1, T]`: of the whole pack, or under context parallelism of this
          rank's zigzag part, which `input_ids` may be too. `mm_token_type_ids` is ignored.
        - rows to pack: both, `[B, S]` with an `attention_mask`, beside `packed_seq_params` or `cu_seqlens`. Segment b
          gets what the mask keeps of row b; the output is that of a pack.
        - `inputs`: a pack of this project, alone.

        Labels are already shifted, unlike those of transformers: `labels[t]` is the target of token t; where it is -100
        or `loss_mask` is 0, the loss is 0. Under context parallelism labels and `loss_mask` of a whole batch give a
        tuple: losses, and this rank's part of the mask. A stage without the head gives `[rows, 1, H]` for the next one:
        hidden states (this rank's part under sequence parallelism), those of the MTP layer if an earlier stage ran it,
        then deepstack features.

        `position_ids` `[3, B, S]` or `[3, 1, T]` (time, row, column), given on every stage, are used as they are. They
        are computed where None, or 2-D as `input_ids` and counting each segment's tokens (not padding) from 0.

        Raises VLBridgeError where the parts of a batch do not match, of a packed one on all context-parallel ranks, and
        for further arguments that would change the result.
        """
        check_keywords(others)
        text = (input_ids, position_ids, attention_mask, labels, loss_mask)
        media = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, mm_token_type_ids)
        raw = RawBatch(*text, *media, cu_seqlens, lengths, packed_seq_params)
        if inputs is not None:
            raw.check_empty()
            return self._forward_pack(inputs)
        processor = None
        if output_processor is not None:
            processor = OutputProcessor(output_processor, output_processor_context, raw.of_megatron())
            raw = raw.for_processor()
        inputs = build_inputs(
            raw, self.config, self.hf_config, self.pg_collection, self.pre_process, self.check_position_ids
        )
        form = OutputForm.of_call(raw, inputs)
        output = self._forward_pack(inputs.to(next(self.parameters()).device), processor)
        return form.apply(output) if self.post_process and processor is None else output

    def _forward_pack(self, inputs: PackedInputs, processor: OutputProcessor | None = None) -> Any:
        check_pack(inputs, self.config, self.seq_length)
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            inputs = inputs.with_sequence_shard(tp.size(), tp.rank())
        # Only these losses of the router distinguish padding.
        router_loss = self.config.moe_aux_loss_coeff or self.config.moe_z_loss_coeff
        segments = None
        if router_loss and "seq_aux_loss" in balancing_types(self.config):
            segments = inputs.segment_index(tp.size(), tp.rank()), len(inputs.layout.lengths)
        embeddings, features = self._embed(inputs) if self.pre_process else (None, self.receive(inputs))
        output = self.language_model(
            embeddings,
            inputs.position_ids,
            deepstack.packed_seq_params(inputs, segments),
            features,
            padding_mask=inputs.padding_mask(tp.size(), tp.rank()) if router_loss else None,
            labels=inputs.labels,
            mtp=inputs.mtp,
            output_processor=processor,
            logits_with_labels=self.logits_with_labels,
        )
        if self.post_process and inputs.labels is not None and not self.logits_with_labels:
            assert inputs.loss_mask is not None
            output = output * inputs.loss_mask
        return output

    def _embed(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[s, 1, H]`, the tower's at their placeholders, and deepstack features `[levels, n, 1, H]`."""
        text = self.language_model.embedding(input_ids=inputs.tokens, position_ids=None)
        decoder, scatter = self.language_model.decoder, self.language_model.scatter
        if not inputs.frames.grids:
            embeddings = scatter(text + self.vision_model.dummy_forward(text))
            return recomputable(embeddings, decoder), text.new_zeros(self._remaining_levels, 0, *text.shape[1:])
        features = tower_features(self.vision_model, inputs, self.pg_collection.cp, self.balance_vision).to(text.dtype)
        embeddings = scatter(text.index_copy(0, inputs.vision_token_index, features[0]))
        return recomputable(embeddings, decoder), deepstack.local_features(features[1:], inputs, self.pg_collection.tp)
