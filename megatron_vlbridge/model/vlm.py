"""Qwen3-VL on Megatron-Core."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import get_mtp_layer_offset
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_vlbridge.backends.packed import PackedSegments, packed_segments
from megatron_vlbridge.backends.select import spec_provider
from megatron_vlbridge.backends.te import without_extra_states
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import pack_order
from megatron_vlbridge.model.inputs import Media, PackedInputs
from megatron_vlbridge.model.language import LanguageModel
from megatron_vlbridge.model.recompute import recomputable
from megatron_vlbridge.model.sharded import Row, row_inputs
from megatron_vlbridge.model.transformer_config import deepstack_travels, vision_config
from megatron_vlbridge.model.vision import VisionModel
from megatron_vlbridge.model.vision_balance import balanced_features

Integers = Sequence[int] | torch.Tensor
# A packed row's `cu_seqlens`, and its segments' lengths without padding where these are known.
Bounds = tuple[Integers, Integers | None]


class Qwen3VLModel(MegatronModule):
    """A pipeline stage of Qwen3-VL, dense or with experts: vision tower and embeddings first, the head last.

    Args:
        config: the language model's `TransformerConfig` (`language_config(checkpoint, ...)`).
        checkpoint: what the checkpoint is (`read_config(folder)`).
        vocab_size: rows of the embedding, where the vocabulary is padded (default: the checkpoint's).
        pre_process, post_process, vp_stage: this stage's part, as Megatron's pretrain gives them.
        balance_vision: share the tower's frames out over the context-parallel ranks; else each rank runs all of them.
        seq_length: length of all packs, where stages (or the all-gather dispatcher) send each other rows of one length.
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
        seq_length: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: BackendSpecProvider | None = None,
    ) -> None:
        super().__init__(config)
        backend = backend or spec_provider()
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.checkpoint = checkpoint
        self._levels = len(checkpoint.vision.deepstack_visual_indexes)
        self._first_layer = get_transformer_layer_offset(config, vp_stage, self.pg_collection.pp.rank())
        self._received: torch.Tensor | None = None
        self.balance_vision, self.seq_length = balance_vision, seq_length
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
        self._refuse_deepstack_that_cannot_travel()
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
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        lengths: Sequence[int] | torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss of each token where there are labels.

        Takes a padded batch (`input_ids`, `attention_mask`, `labels` `[B, S]` and the processor's media, on any device)
        and gives `[B, S, V]` or `[B, S]`, V being this rank's part of the padded vocabulary; or takes `inputs`, a pack,
        and gives `[1, T, V]` or `[1, T]`. Labels are next tokens; where they are -100 the loss is 0.
        `mm_token_type_ids` `[B, S]` (1 image, 2 video) is only checked.
        A stage without the head gives hidden states `[T, 1, H]` for the next one.

        With `cu_seqlens` (of the whole pack, padding included; `lengths` without it) or Megatron's `packed_seq_params`,
        `input_ids` and `labels` are a packed row `[1, T]`: the whole pack, or under context parallelism this rank's
        zigzag part of it, in which case the output is that of its part too. Every rank takes all media; pipeline stages
        behind the first only need the grids.

        Raises:
            VLBridgeError: where the parts of the batch do not fit each other; with a packed row on every
                context-parallel rank alike.
        """
        batch = (input_ids, attention_mask, labels, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if inputs is not None:
            self._refuse_beside_inputs(*batch, mm_token_type_ids, cu_seqlens, lengths, packed_seq_params)
            return self._forward_pack(inputs)
        make_bounds = partial(_bounds, cu_seqlens, lengths, packed_seq_params)
        # Under context parallelism nothing of one rank's arguments may be refused before the others can hear of it.
        if self.config.context_parallel_size == 1 and make_bounds() is None:
            return self._forward_padded(batch, mm_token_type_ids)
        return self._forward_row(lambda: self._row(batch, mm_token_type_ids, make_bounds()))

    def _forward_padded(
        self, batch: Sequence[torch.Tensor | None], mm_token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        ids, mask, labels, media = self._on_host(batch)
        if self.config.pipeline_model_parallel_size > 1 and not self.config.variable_seq_lengths:
            raise VLBridgeError(
                "a padded [B, S] batch has as many rows as its conversations have tokens, so pipeline stages send each "
                "other tensors of changing length; make the model's config with "
                "language_config(..., variable_seq_lengths=True)"
            )
        if self.config.expert_model_parallel_size > 1 and self.config.moe_token_dispatcher_type == "allgather":
            raise VLBridgeError(
                "padded [B, S] batches have as many rows as their conversations have tokens, and Megatron's all-gather "
                "dispatcher wants as many on every expert-parallel rank; use --moe-token-dispatcher-type alltoall"
            )
        self._refuse_other_kinds(ids, mm_token_type_ids)
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        pack = PackedInputs.from_padded(ids, mask, media, self.checkpoint, labels, shards)
        output = self._forward_pack(pack.to(next(self.parameters()).device))
        return pack.layout.unpack(output) if self.post_process else output

    def _forward_row(self, make_row: Callable[[], Row]) -> torch.Tensor:
        inputs = row_inputs(make_row, self.checkpoint, self.pg_collection.cp)
        return self._forward_pack(self._sequence_parallel(inputs).to(next(self.parameters()).device))

    def _row(
        self, batch: Sequence[torch.Tensor | None], mm_token_type_ids: torch.Tensor | None, bounds: Bounds | None
    ) -> Row:
        ids, mask, labels, media = self._on_host(batch)
        if bounds is None:
            raise VLBridgeError(
                f"a padded [B, S] batch is not offered under context parallelism (size "
                f"{self.config.context_parallel_size}): no rank would hold whole rows. Give a packed row with "
                "`cu_seqlens`, or a pack as `inputs`"
            )
        cu_seqlens, lengths = bounds
        if mask is not None or mm_token_type_ids is not None:
            raise VLBridgeError(
                "a packed row (cu_seqlens) has neither attention_mask nor mm_token_type_ids: `lengths` says what is "
                "padding, and the placeholders what is a picture"
            )
        if lengths is None and (self.config.moe_aux_loss_coeff or self.config.moe_z_loss_coeff):
            raise VLBridgeError(
                "the losses of the router must not count padding, and cu_seqlens alone does not say which tokens are "
                "padding; give the segments' true `lengths` beside it. (packed_seq_params whose cu_seqlens_q_padded is "
                "missing, or the same as cu_seqlens_q, does not say it either: give `cu_seqlens` and `lengths` instead)"
            )
        return Row(ids, cu_seqlens, media, labels, lengths)

    def _on_host(
        self, batch: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Media]:
        """Tokens, mask, labels and media, where a pack is made: the host has to know its lengths and grids."""
        ids, mask, labels, pixels, image_grids, video_pixels, video_grids = batch
        if ids is None:
            raise VLBridgeError("Qwen3VLModel takes input_ids, and what belongs to them, or a pack as `inputs`")
        # By far the largest part of a batch, which stages without the tower do not read.
        if self.pre_process:
            pixels, video_pixels = _on_cpu(pixels), _on_cpu(video_pixels)
        media = Media(pixels, _on_cpu(image_grids), video_pixels, _on_cpu(video_grids), patches_wanted=self.pre_process)
        return ids.cpu(), _on_cpu(mask), _on_cpu(labels), media

    def _forward_pack(self, inputs: PackedInputs) -> torch.Tensor:
        tp_size = self.pg_collection.tp.size()
        if self.config.sequence_parallel and inputs.tokens.shape[1] % tp_size:
            raise VLBridgeError(
                f"sequence parallelism cuts the {inputs.tokens.shape[1]} tokens that each rank gets of a pack of "
                f"{inputs.layout.total} (context-parallel size {inputs.layout.cp_size}) in {tp_size} equal parts; "
                f"use a sequence length that is a multiple of {tp_size * inputs.layout.cp_size}"
            )
        fixed = self.config.pipeline_model_parallel_size > 1 and not self.config.variable_seq_lengths
        if fixed and self.seq_length not in (None, inputs.layout.total):
            raise VLBridgeError(
                f"the pack has {inputs.layout.total} tokens, but the pipeline stages send each other "
                f"{self.seq_length} (--seq-length); make all packs as long"
            )
        self._refuse_length_of_all_gather(inputs.layout.total)
        inputs = self._sequence_parallel(inputs)
        embeddings, deepstack = self._embed(inputs) if self.pre_process else (None, self._split_received(inputs))
        output = self.language_model(
            embeddings,
            inputs.position_ids,
            self._packed(inputs),
            padding_mask=self._padding(inputs),
            deepstack=deepstack,
            labels=inputs.labels,
            mtp=inputs.mtp,
        )
        if self.post_process and inputs.labels is not None:
            assert inputs.loss_mask is not None
            output = output * inputs.loss_mask
        return output

    def _embed(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings `[s, 1, H]` with pictures in place, and this rank's deepstack rows `[levels, n, 1, H]`."""
        words = self.language_model.embedding(input_ids=inputs.tokens, position_ids=None)
        decoder = self.language_model.decoder
        if not inputs.frames.grids:
            silent = self._scatter(words + self._silent_tower(words))
            return recomputable(silent, decoder), words.new_zeros(self._levels, 0, *words.shape[1:])
        features = self._features(inputs).to(words.dtype)[:, :, None]
        if inputs.feature_rows is not None:
            features = features[:, inputs.feature_rows]
        embeddings = self._scatter(words.index_copy(0, inputs.vision_rows, features[0]))
        levels = features[1:]
        if inputs.part is not None:
            # Each rank adds a part of the rows, so their gradient is summed over the ranks.
            levels = copy_to_tensor_model_parallel_region(levels, group=self.pg_collection.tp)[:, inputs.part.features]
        return recomputable(embeddings, decoder), levels

    def _split_received(self, inputs: PackedInputs) -> torch.Tensor:
        """The deepstack rows `[rest, n, 1, H]` behind the hidden states that the previous stage sent."""
        received, self._received = self._received, None
        if received is None:
            raise VLBridgeError("a stage without embeddings needs the hidden states of the previous one")
        tokens = inputs.tokens.shape[1] // (1 if inputs.part is None else self.pg_collection.tp.size())
        # Behind the stage of the prediction layer its output follows that of the decoder.
        tokens *= 1 + get_mtp_layer_offset(self.config, self.vp_stage)
        rest = max(0, self._levels - self._first_layer)
        pictures = len(inputs.deepstack_rows)
        if received.shape[0] != tokens + rest * pictures:
            raise VLBridgeError(
                f"pipeline stage {self.pg_collection.pp.rank()} received {received.shape[0]} rows, expected {tokens} "
                f"tokens and {rest} x {pictures} rows of deepstack features. Do all stages read the same packs, "
                "and have these the --seq-length that the schedule was told?"
            )
        self.language_model.decoder.set_input_tensor(received[:tokens])
        return received[tokens:].view(rest, pictures, *received.shape[1:])

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

    def _packed(self, inputs: PackedInputs) -> PackedSegments:
        layout = inputs.layout
        order = pack_order(layout.segments, layout.cp_size) if layout.cp_size > 1 else None
        return packed_segments(layout.segments, inputs.tokens.device, order, inputs.deepstack_rows)

    def _padding(self, inputs: PackedInputs) -> torch.Tensor | None:
        """`[1, s]`: which of this rank's rows are padding, where the router has a loss that must not count them."""
        if not (self.config.moe_aux_loss_coeff or self.config.moe_z_loss_coeff):
            return None
        padding = inputs.layout.sources < 0
        if self.config.sequence_parallel:
            padding = padding.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return padding[None].to(inputs.tokens.device, non_blocking=True)

    def _sequence_parallel(self, inputs: PackedInputs) -> PackedInputs:
        if not self.config.sequence_parallel or inputs.part is not None:
            return inputs
        return inputs.sequence_parallel(self.pg_collection.tp.size(), self.pg_collection.tp.rank())

    def _scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, 1, H]` -> this rank's part under sequence parallelism, else unchanged."""
        if not self.config.sequence_parallel:
            return rows
        return scatter_to_sequence_parallel_region(rows, group=self.pg_collection.tp)

    def _refuse_length_of_all_gather(self, found: int) -> None:
        if self.config.expert_model_parallel_size == 1 or self.config.moe_token_dispatcher_type != "allgather":
            return
        if found != self.seq_length:
            told = self.seq_length is not None
            wanted = f"{self.seq_length} (--seq-length)" if told else "a number that the model was not told"
            remedy = "make all packs as long" if told else "give the model `seq_length`, the length of all packs"
            raise VLBridgeError(
                f"the pack has {found} tokens, and Megatron's all-gather dispatcher of tokens to experts wants as many "
                f"on every expert-parallel rank, here {wanted}; {remedy}, or use --moe-token-dispatcher-type alltoall"
            )

    @staticmethod
    def _refuse_beside_inputs(*others: object) -> None:
        if any(x is not None for x in others):
            raise VLBridgeError(
                "Qwen3VLModel takes either input_ids and what belongs to them, or a pack as `inputs`, not both"
            )

    def _refuse_other_kinds(self, ids: torch.Tensor, mm_token_type_ids: torch.Tensor | None) -> None:
        if mm_token_type_ids is None:
            return
        kinds = (ids == self.checkpoint.image_token_id).long() + 2 * (ids == self.checkpoint.video_token_id).long()
        if not torch.equal(kinds, mm_token_type_ids.cpu().long()):
            raise VLBridgeError(
                "mm_token_type_ids: expected 1 at image placeholders, 2 at video placeholders and 0 elsewhere in "
                f"input_ids {list(ids.shape)}, found another table {list(mm_token_type_ids.shape)}"
            )

    def _refuse_deepstack_that_cannot_travel(self) -> None:
        if deepstack_travels(self.config, self.checkpoint) and not self.config.variable_seq_lengths:
            raise VLBridgeError(
                f"the first {self._levels} decoder layers take deepstack features and lie on several pipeline stages, "
                "so these send each other rows of changing number, which needs variable_seq_lengths. "
                "Make the model's config with language_config, which sets it"
            )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's, see there; the same entries on every backend."""
        return without_extra_states(super().sharded_state_dict(*args, **kwargs))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand over the previous stage's output here."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied weight of this stage, whose gradient Megatron adds up over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def _bounds(cu_seqlens: Integers | None, lengths: Integers | None, params: PackedSeqParams | None) -> Bounds | None:
    """`cu_seqlens` of a packed row, and its segments' lengths without padding where known; None: no packed row."""
    if params is not None and (cu_seqlens is not None or lengths is not None):
        raise VLBridgeError("packed_seq_params says where the segments end; leave out cu_seqlens and lengths")
    if lengths is not None and cu_seqlens is None:
        raise VLBridgeError("lengths are those of a packed row's segments, and need cu_seqlens beside them")
    if params is not None:
        return _bounds_of(params)
    return None if cu_seqlens is None else (cu_seqlens, lengths)


def _bounds_of(params: PackedSeqParams) -> Bounds:
    """`cu_seqlens` with padding, and the lengths without where Megatron's parameters of a pack tell them apart."""
    if params.cu_seqlens_q is None:
        raise VLBridgeError("packed_seq_params has no cu_seqlens_q; a packed row needs where its segments end")
    if params.cu_seqlens_q_padded is None:
        return params.cu_seqlens_q, None
    if params.cu_seqlens_q_padded.tolist() == params.cu_seqlens_q.tolist():
        # Some frameworks give the padded ones as both.
        return params.cu_seqlens_q, None
    return params.cu_seqlens_q_padded, params.cu_seqlens_q.diff()
