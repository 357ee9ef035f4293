"""What `Qwen3VLModel.forward` is called with, in any of its forms, becomes one pack."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.zigzag import zigzag_index
from megatron_vlbridge.model.call.table import Table, keep_mask
from megatron_vlbridge.model.inputs.media import Media
from megatron_vlbridge.model.inputs.pack import PackedInputs
from megatron_vlbridge.model.inputs.positions import GivenPositions
from megatron_vlbridge.model.inputs.thd import from_thd
from megatron_vlbridge.model.inputs.thd_batch import Integers, ThdBatch, bounds_of
from megatron_vlbridge.model.inputs.tokens import IGNORED, filler_token, placeholders


@dataclass(frozen=True)
class RawBatch:
    """The arguments of a call, as the caller gave them, on any device: see `Qwen3VLModel.forward`."""

    input_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    mm_token_type_ids: torch.Tensor | None = None
    cu_seqlens: Integers | None = None
    lengths: Integers | None = None
    packed_seq_params: PackedSeqParams | None = None
    processed: bool = False

    def check_empty(self) -> None:
        """Reject arguments beside a pack (VLBridgeError)."""
        if any(getattr(self, field.name) is not None for field in fields(self) if field.name != "processed"):
            raise VLBridgeError(
                "Qwen3VLModel takes either input_ids and what belongs to them, or a pack as `inputs`, not both"
            )

    def bounds(self) -> tuple[Integers, Integers | None] | None:
        """`cu_seqlens` of a packed batch, and its segments' lengths without padding where known; None: not packed."""
        if self.packed_seq_params is not None:
            if self.cu_seqlens is not None or self.lengths is not None:
                raise VLBridgeError("packed_seq_params says where the segments end; leave out cu_seqlens and lengths")
            return bounds_of(self.packed_seq_params)
        if self.lengths is not None and self.cu_seqlens is None:
            raise VLBridgeError("lengths are those of a packed batch's segments, and need cu_seqlens beside them")
        return None if self.cu_seqlens is None else (self.cu_seqlens, self.lengths)

    def of_megatron(self) -> dict[str, Any]:
        """The arguments that Megatron passes on to an output processor."""
        names = ("labels", "loss_mask", "input_ids", "position_ids", "attention_mask", "packed_seq_params")
        return {name: getattr(self, name) for name in names}

    def for_processor(self) -> Self:
        """The batch without labels, which are the output processor's."""
        return replace(self, labels=None, loss_mask=None, processed=True)

    def tokens(self) -> torch.Tensor:
        """`input_ids` on the host."""
        if self.input_ids is None:
            raise VLBridgeError("Qwen3VLModel takes input_ids, and what belongs to them, or a pack as `inputs`")
        return self.input_ids.cpu()

    def table(self, cp_size: int) -> Table | None:
        """Where rows `[B, S]` are in the packed batch; None where `input_ids` are packed already.

        Raises VLBridgeError where the mask does not match the tokens or `cu_seqlens`.
        """
        ids, bounds = self.tokens(), self.bounds()
        if bounds is None and self.processed:
            raise VLBridgeError(
                "output_processor gets the hidden states of a packed batch; give packed_seq_params beside the padded "
                "rows and their mask, or leave output_processor out"
            )
        mask = keep_mask(self.attention_mask, ids)
        if bounds is None:
            if ids.dim() != 2 or ids.shape[1] % (2 * cp_size):
                raise VLBridgeError(
                    f"input_ids of a padded batch are [B, S], under context parallelism of size {cp_size} with S a "
                    f"multiple of {2 * cp_size}, found {list(ids.shape)}. Pad the rows on the right"
                )
            return Table.of_rows(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        if mask is None:
            return None
        if self.lengths is not None:
            raise VLBridgeError("attention_mask and `lengths` both say what is padding; leave one of them out")
        return Table.in_segments(mask, *bounds)

    def supervised(self, with_mtp: bool) -> torch.Tensor | None:
        """The labels on the host, -100 also where `loss_mask` is 0.

        Raises VLBridgeError where the mask does not match the labels, or has other values than 0 and 1 `with_mtp`.
        """
        if self.labels is None:
            return None
        labels, mask = self.labels.cpu(), _on_host(self.loss_mask)
        if mask is None:
            return labels
        if mask.shape != labels.shape:
            raise VLBridgeError(
                f"loss_mask: expected {list(labels.shape)} as the labels, found {list(mask.shape)}; give both for the "
                "same tokens"
            )
        if with_mtp and not bool(((mask == 0) | (mask == 1)).all()):
            raise VLBridgeError(
                "loss_mask: the loss of the MTP layer takes 0 and 1 alone, found other values, by which it would not "
                "be multiplied; multiply the losses of the call instead"
            )
        return labels.masked_fill(mask == 0, IGNORED)

    def media(self, with_patches: bool) -> Media:
        """Media on the host. Patches, by far the largest part, stay where they are if the stage does not read them."""
        pixels = (self.pixel_values, self.pixel_values_videos)
        images, videos = map(_on_host, pixels) if with_patches else pixels
        return Media(
            images, _on_host(self.image_grid_thw), videos, _on_host(self.video_grid_thw), patches_wanted=with_patches
        )


def build_inputs(
    raw: RawBatch,
    config: TransformerConfig,
    hf_config: Config,
    pg_collection: ProcessGroupCollection,
    with_patches: bool,
    check_position_ids: bool = False,
) -> PackedInputs:
    """The pack of a call's arguments, on the host, where its lengths and grids are needed.

    `check_position_ids`: given positions must be the computed ones.

    Raises VLBridgeError where the arguments do not match; with a packed batch on every context-parallel rank alike.
    """
    # Under context parallelism a rank must not raise on its own arguments before the others can receive the failure.
    if config.context_parallel_size == 1 and raw.bounds() is None and not raw.processed:
        positions = GivenPositions.of(raw.position_ids, check_position_ids)
        inputs = _from_padded(raw, config, hf_config, with_patches)
        inputs = inputs.with_positions(positions and positions.packed(inputs.layout))
    else:
        inputs = from_thd(
            lambda: _thd_batch(raw, config, hf_config, with_patches, check_position_ids),
            hf_config,
            pg_collection.cp,
        )
    if config.sequence_parallel:
        # On the host: on a device, the number of image tokens would be a sync.
        inputs = inputs.with_sequence_shard(pg_collection.tp.size(), pg_collection.tp.rank())
    return inputs


def _from_padded(raw: RawBatch, config: TransformerConfig, hf_config: Config, with_patches: bool) -> PackedInputs:
    ids, media = raw.tokens(), raw.media(with_patches)
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        raise VLBridgeError(
            "a padded [B, S] batch has as many rows as its conversations have tokens, so pipeline stages exchange "
            "tensors of varying length; make the model's config with language_config(..., variable_seq_lengths=True)"
        )
    if config.expert_model_parallel_size > 1 and config.moe_token_dispatcher_type == "allgather":
        raise VLBridgeError(
            "padded [B, S] batches have as many rows as their conversations have tokens, and Megatron's all-gather "
            "dispatcher needs as many on every expert-parallel rank; use --moe-token-dispatcher-type alltoall"
        )
    _check_token_types(ids, raw, hf_config)
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return PackedInputs.from_padded(
        ids,
        keep_mask(raw.attention_mask, ids),
        media,
        hf_config,
        raw.supervised(bool(config.mtp_num_layers)),
        multiple_of=shards,
    )


def _check_token_types(ids: torch.Tensor, raw: RawBatch, hf_config: Config) -> None:
    if raw.mm_token_type_ids is None:
        return
    found = raw.mm_token_type_ids.cpu()
    images, videos = placeholders(ids, hf_config)
    if not torch.equal(images.long() + 2 * videos.long(), found.long()):
        raise VLBridgeError(
            "mm_token_type_ids: expected 1 at image placeholders, 2 at video placeholders and 0 elsewhere in "
            f"input_ids {list(ids.shape)}, found another table {list(found.shape)}"
        )


def _thd_batch(
    raw: RawBatch, config: TransformerConfig, hf_config: Config, with_patches: bool, check_position_ids: bool
) -> ThdBatch:
    if raw.processed and config.mtp_num_layers:
        raise VLBridgeError(
            "output_processor is not supported with an MTP layer, whose loss would be left out; build the model "
            "without the layer (mtp_num_layers=None) or leave output_processor out"
        )
    positions = GivenPositions.of(raw.position_ids, check_position_ids)
    ids, labels, media = raw.tokens(), raw.supervised(bool(config.mtp_num_layers)), raw.media(with_patches)
    table, bounds = raw.table(config.context_parallel_size), raw.bounds()
    if table is not None:
        _check_token_types(ids, raw, hf_config)
        labels = None if labels is None else table.row(labels, IGNORED)
        ids, positions = table.row(ids, filler_token(hf_config)), table.positions(positions)
        bounds = table.cu_seqlens, table.lengths
    assert bounds is not None
    cu_seqlens, lengths = bounds
    if lengths is None and (config.moe_aux_loss_coeff or config.moe_z_loss_coeff):
        raise VLBridgeError(
            "the losses of the router must not count padding, and cu_seqlens alone does not say which tokens are "
            "padding; give the segments' true `lengths` beside it. (packed_seq_params whose cu_seqlens_q_padded is "
            "missing, or the same as cu_seqlens_q, does not say it either: give `cu_seqlens` and `lengths` instead)"
        )
    return ThdBatch(ids, cu_seqlens, media, labels, lengths, positions)


@dataclass(frozen=True)
class OutputForm:
    """The form of a call's output: rows of this `shape`, if any, and beside it this rank's part of a loss `mask`."""

    layout: BatchLayout
    shape: tuple[int, int] | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of_call(cls, raw: RawBatch, inputs: PackedInputs) -> Self:
        """Of a call whose arguments became `inputs`; before the forward, since a mask on a device is copied."""
        layout, mask = inputs.layout, None
        if layout.cp_size > 1 and raw.labels is not None and raw.loss_mask is not None:
            table = raw.table(layout.cp_size)
            whole = raw.loss_mask.cpu() if table is None else table.row(raw.loss_mask.cpu(), 0)
            # The mask of this rank's part is the caller's already.
            if whole.shape[-1] == layout.total:
                mask = whole[:, zigzag_index(layout.segments, layout.cp_size, layout.cp_rank)]
        if raw.packed_seq_params is not None or raw.cu_seqlens is not None or layout.table is not None:
            return cls(layout, None, mask)
        rows, width = raw.tokens().shape
        shape = rows, width // layout.cp_size
        return cls(layout, shape, None if mask is None else mask.view(shape))

    def apply(self, output: torch.Tensor) -> Any:
        """What the call gives, from the output `[1, T, ...]` of the last stage."""
        if self.layout.table is not None:
            return self.layout.unpack(output)
        output = output if self.shape is None else output.view(*self.shape, *output.shape[2:])
        return output if self.mask is None else (output, self.mask.to(output.device))


def check_pack(inputs: PackedInputs, config: TransformerConfig, seq_length: int | None) -> None:
    """Reject a pack whose length the parallel layout does not support; `seq_length`: that of all packs, if fixed.

    Raises VLBridgeError, naming the length and the one expected.
    """
    total, cp_size = inputs.layout.total, inputs.layout.cp_size
    tokens, tp_size = inputs.tokens.shape[1], config.tensor_model_parallel_size
    if config.sequence_parallel and tokens % tp_size:
        raise VLBridgeError(
            f"sequence parallelism splits the {tokens} tokens that each rank gets of a pack of {total} "
            f"(context-parallel size {cp_size}) into {tp_size} equal parts; use a sequence length that is a multiple "
            f"of {tp_size * cp_size}"
        )
    fixed = config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths
    if fixed and seq_length not in (None, total):
        raise VLBridgeError(
            f"the pack has {total} tokens, but the pipeline stages exchange {seq_length} (--seq-length); make all "
            "packs that long"
        )
    all_gather = config.expert_model_parallel_size > 1 and config.moe_token_dispatcher_type == "allgather"
    if all_gather and seq_length != total:
        expected, remedy = f"{seq_length} (--seq-length)", "make all packs that long"
        if seq_length is None:
            expected, remedy = "an unknown length", "give the model `seq_length`, the length of all packs"
        raise VLBridgeError(
            f"the pack has {total} tokens, and Megatron's all-gather dispatcher of tokens to experts needs as many on "
            f"every expert-parallel rank, here {expected}; {remedy}, or use --moe-token-dispatcher-type alltoall"
        )


def _on_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()
