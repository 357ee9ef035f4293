"""Qwen3-VL on Megatron-Core."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.backends.packed import PackedSegments, packed_segments
from megatron_vlbridge.backends.select import spec_provider
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import pack_order
from megatron_vlbridge.model.inputs import Media, PackedInputs
from megatron_vlbridge.model.language import LanguageModel
from megatron_vlbridge.model.recompute import recomputable
from megatron_vlbridge.model.transformer_config import vision_config
from megatron_vlbridge.model.vision import VisionModel
from megatron_vlbridge.model.vision_balance import balanced_features


class Qwen3VLModel(MegatronModule):
    """A pipeline stage of dense Qwen3-VL: vision tower and embeddings on the first, the head on the last.

    Args:
        config: the language model's `TransformerConfig` (`language_config(checkpoint, ...)`).
        checkpoint: what the checkpoint is (`read_config(folder)`).
        vocab_size: rows of the embedding, where the vocabulary is padded (default: the checkpoint's).
        pre_process, post_process, vp_stage: this stage's part, as Megatron's pretrain gives them.
        balance_vision: share the tower's frames out over the context-parallel ranks; else each rank runs all of them.
        parallel_output: leave the logits split over the tensor-parallel ranks.
        backend: which kernels (default: the CPU's where the CPU runtime is enabled, else Transformer Engine).

    Example:
        >>> checkpoint = read_config("Qwen3-VL-2B-Instruct")
        >>> model = Qwen3VLModel(language_config(checkpoint), checkpoint)
        >>> load_hf_weights(model, "Qwen3-VL-2B-Instruct")
        >>> logits = model(**processor(text=[text], images=[image], return_tensors="pt"))
    """

    def __init__(
        self,
        config: TransformerConfig,
        checkpoint: Config,
        *,
        vocab_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        parallel_output: bool = True,
        balance_vision: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        backend: BackendSpecProvider | None = None,
    ) -> None:
        super().__init__(config)
        backend = backend or spec_provider()
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.checkpoint = checkpoint
        self.balance_vision = balance_vision
        # Megatron's schedules, DDP and gradient finalisation look for these names.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = checkpoint.tie_word_embeddings
        self.language_model = LanguageModel(
            config,
            checkpoint,
            backend,
            self.pg_collection,
            vocab_size=vocab_size or checkpoint.text.vocab_size,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            vp_stage=vp_stage,
        )
        self._refuse_deepstack_on_a_later_stage()
        if pre_process:
            self.vision_model = VisionModel(vision_config(checkpoint, config), checkpoint, backend, self.pg_collection)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs: PackedInputs | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss of each token where there are labels.

        Takes a padded batch (`input_ids`, `attention_mask`, `labels` `[B, S]` and the processor's media, on any device)
        and gives `[B, S, V]` or `[B, S]`, V being this rank's part of the padded vocabulary; or takes `inputs`, a pack,
        and gives `[1, T, V]` or `[1, T]`. Labels are next tokens; where they are -100 the loss is 0.
        `mm_token_type_ids` `[B, S]` (1 image, 2 video) is only checked.
        A stage without the head gives hidden states `[T, 1, H]` for the next one.

        Raises:
            VLBridgeError: where the parts of the batch do not fit each other.
        """
        batch = (input_ids, attention_mask, labels, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if (inputs is None) == (input_ids is None) or (inputs is not None and any(x is not None for x in batch)):
            raise VLBridgeError(
                "Qwen3VLModel takes either input_ids [B, S] and what belongs to them, or a pack as `inputs`"
            )
        if inputs is not None:
            return self._forward_pack(inputs)
        if self.config.context_parallel_size > 1:
            raise VLBridgeError(
                f"a padded [B, S] batch is not offered under context parallelism (size "
                f"{self.config.context_parallel_size}): no rank would hold whole rows. Give a pack as `inputs`"
            )
        # A pack is made on the host, which has to know its lengths and grids.
        ids, mask, labels, *media = (None if x is None else x.cpu() for x in batch)
        assert ids is not None
        self._refuse_other_kinds(ids, mm_token_type_ids)
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        pack = PackedInputs.from_padded(ids, mask, Media(*media), self.checkpoint, labels, shards)
        output = self._forward_pack(pack.to(next(self.parameters()).device))
        return pack.layout.unpack(output) if self.post_process else output

    def _forward_pack(self, inputs: PackedInputs) -> torch.Tensor:
        tp_size = self.pg_collection.tp.size()
        if self.config.sequence_parallel and inputs.tokens.shape[1] % tp_size:
            raise VLBridgeError(
                f"sequence parallelism cuts the {inputs.tokens.shape[1]} tokens that each rank gets of a pack of "
                f"{inputs.layout.total} (context-parallel size {inputs.layout.cp_size}) in {tp_size} equal parts; "
                f"use a sequence length that is a multiple of {tp_size * inputs.layout.cp_size}"
            )
        embeddings = deepstack = None
        if self.pre_process:
            embeddings, deepstack = self._embed(inputs)
            embeddings = recomputable(embeddings, self.language_model.decoder)
        output = self.language_model(
            inputs.tokens,
            inputs.position_ids,
            attention_mask=None,
            decoder_input=embeddings,
            labels=inputs.labels,
            packed_seq_params=self._packed(inputs.layout, inputs.tokens.device),
            extra_block_kwargs=None if deepstack is None else {"context": deepstack},
        )
        if self.post_process and inputs.labels is not None:
            assert inputs.loss_mask is not None
            output = output * inputs.loss_mask
        return output

    def _embed(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings with the pictures in place `[s, 1, H]`, and the deepstack rows `[levels, s, 1, H]`."""
        words = self.language_model.embedding(input_ids=inputs.tokens, position_ids=None)
        if not inputs.frames.grids:
            return self._scatter(words + self._silent_tower(words)), None
        features = self._features(inputs).to(words.dtype)[:, :, None]
        if inputs.feature_rows is not None:
            features = features[:, inputs.feature_rows]
        embeddings = self._scatter(words.index_copy(0, inputs.vision_rows, features[0]))
        if len(features) == 1:
            return embeddings, None
        levels = words.new_zeros((len(features) - 1, *words.shape)).index_copy(1, inputs.vision_rows, features[1:])
        return embeddings, torch.stack([self._scatter(level) for level in levels])

    def _features(self, inputs: PackedInputs) -> torch.Tensor:
        if self.pg_collection.cp.size() > 1 and self.balance_vision:
            return balanced_features(self.vision_model, inputs.patches, inputs.frames, self.pg_collection.cp)
        return self.vision_model(inputs.patches, inputs.frames)

    def _silent_tower(self, words: torch.Tensor) -> torch.Tensor | float:
        """Zero, made by the tower from a blank picture, so that a batch of text gives every parameter a gradient.

        Megatron's overlapped gradient reduction waits for each parameter's gradient; without one it fails.
        """
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.vision_model.parameters()):
            return 0.0
        vision = self.checkpoint.vision
        side = vision.spatial_merge_size
        blank = torch.zeros(side**2, vision.patch_dim, device=words.device)
        return self.vision_model(blank, Frames(((1, side, side),), side)).sum().to(words.dtype) * 0.0

    def _packed(self, layout: BatchLayout, device: torch.device) -> PackedSegments:
        order = pack_order(layout.segments, layout.cp_size) if layout.cp_size > 1 else None
        return packed_segments(layout.segments, device, order)

    def _scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, 1, H]` -> this rank's part under sequence parallelism, else unchanged."""
        if not self.config.sequence_parallel:
            return rows
        return scatter_to_sequence_parallel_region(rows, group=self.pg_collection.tp)

    def _refuse_other_kinds(self, ids: torch.Tensor, mm_token_type_ids: torch.Tensor | None) -> None:
        if mm_token_type_ids is None:
            return
        kinds = (ids == self.checkpoint.image_token_id).long() + 2 * (ids == self.checkpoint.video_token_id).long()
        if not torch.equal(kinds, mm_token_type_ids.cpu().long()):
            raise VLBridgeError(
                "mm_token_type_ids: expected 1 at image placeholders, 2 at video placeholders and 0 elsewhere in "
                f"input_ids {list(ids.shape)}, found another table {list(mm_token_type_ids.shape)}"
            )

    def _refuse_deepstack_on_a_later_stage(self) -> None:
        levels = len(self.checkpoint.vision.deepstack_visual_indexes)
        layers = get_num_layers_to_build(self.config, vp_stage=0, pp_rank=0)
        if layers < levels:
            raise VLBridgeError(
                f"the first {levels} decoder layers take deepstack features and must lie on the first pipeline stage, "
                f"which holds {layers} of {self.config.num_layers} layers "
                f"(pipeline size {self.config.pipeline_model_parallel_size}). Use fewer stages, or give the first one "
                f"at least {levels} layers (num_layers_in_first_pipeline_stage)"
            )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand over the previous stage's output here."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied weight of this stage, whose gradient Megatron adds up over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()
