"""The vision tower: a ViT of Megatron's own layers, tensor-parallel and sequence-parallel like the language model."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu, pad

from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.config import Config, VisionConfig
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.model.recompute import recomputable
from megatron_vlbridge.model.rope import inverse_frequencies, rotary_table
from megatron_vlbridge.model.specs import block_spec, layer_spec

ROPE_THETA = 10000.0


class PatchProjection(torch.nn.Conv3d):
    """A convolution whose stride is its size, run as the linear map of patches that it is.

    A module of its own, since Megatron's overlapped parameter gathering waits for the parameters of called modules.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`[N, patch_dim]` -> `[N, h]`."""
        return torch.nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbedding(MegatronModule):
    """One linear map of each patch; its weight keeps the shape of the checkpoint's convolution."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig) -> None:
        super().__init__(config)
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = PatchProjection(
            vision.in_channels, vision.hidden_size, patch, stride=patch, dtype=config.params_dtype
        )
        _init(self.proj, config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`[N, patch_dim]` -> `[N, h]`."""
        return self.proj(patches)


class PatchMerger(MegatronModule):
    """Joins the patches of a merge block into one token of the language model's width.

    Takes `[N / tp, 1, h]` (sequence-parallel) or `[N, 1, h]`, gives the same rows / merge_area, width `out`.
    The tower's own merger norms each patch, the deepstack mergers the joined block.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
        norm_after_join: bool,
    ) -> None:
        super().__init__(config)
        self.joined = vision.hidden_size * vision.merge_area
        self.norm_after_join = norm_after_join
        norm_size = self.joined if norm_after_join else vision.hidden_size
        self.norm = backend.layer_norm()(config=config, hidden_size=norm_size, eps=config.layernorm_epsilon)
        shared = {
            "config": config,
            "init_method": config.init_method,
            "bias": True,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": pg_collection.tp,
        }
        self.linear_fc1 = backend.column_parallel_linear()(self.joined, self.joined, gather_output=False, **shared)
        self.linear_fc2 = backend.row_parallel_linear()(
            self.joined, vision.out_hidden_size, input_is_parallel=True, **shared
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Merge."""
        if self.norm_after_join:
            joined = self.norm(hidden_states.reshape(-1, 1, self.joined))
        else:
            joined = self.norm(hidden_states).reshape(-1, 1, self.joined)
        hidden, _ = self.linear_fc1(joined)
        output, _ = self.linear_fc2(gelu(hidden))
        return output


class PatchMergers(torch.nn.ModuleList):
    """A list of mergers whose checkpoint entries know how they are split over the ranks."""

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Each merger's own entries; torch's list would give every rank's part as if it were the whole tensor."""
        entries: dict[str, Any] = {}
        mergers: Iterable[Any] = self
        for index, merger in enumerate(mergers):
            entries |= merger.sharded_state_dict(f"{prefix}{index}.", *args, **kwargs)
        return entries


class VisionModel(MegatronModule):
    """The vision tower: patches of images and videos -> tokens of the language model, and deepstack features.

    `config` is the tower's own (`model.transformer_config.vision_config`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Config,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.vision = vision = hf_config.vision
        self.pg_collection = pg_collection
        self.patch_embed = PatchEmbedding(config, vision)
        self.pos_embed = torch.nn.Embedding(
            vision.num_position_embeddings, vision.hidden_size, dtype=config.params_dtype
        )
        _init(self.pos_embed, config)
        layer = layer_spec(backend, config, AttnMaskType.no_mask)
        self.decoder = TransformerBlock(
            config,
            block_spec(backend, config, [layer] * vision.depth),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.merger = PatchMerger(config, vision, backend, pg_collection, norm_after_join=False)
        self.deepstack_merger_list = PatchMergers(
            PatchMerger(config, vision, backend, pg_collection, norm_after_join=True)
            for _ in vision.deepstack_visual_indexes
        )

    def forward(self, patches: torch.Tensor, frames: Frames) -> torch.Tensor:
        """`[N, patch_dim]` in the processor's order -> `[1 + deepstack levels, N / merge_area, H]`.

        At 0 are the image's tokens, at 1 + k what is added after decoder layer k: the features of the k-th of the
        deepstack blocks, counted from the tower's input, whatever their order in `deepstack_visual_indexes`.
        """
        device = patches.device
        index, weight = frames.table_weights(int(self.vision.num_position_embeddings**0.5), device)
        positions = (self.pos_embed(index) * weight[..., None]).sum(0)
        hidden = self.patch_embed(patches)
        hidden = hidden + positions.to(hidden.dtype)
        table = self._rotary_table(frames, device)

        # Under sequence parallelism each rank holds whole merge blocks; the padding is a frame of its own.
        shards = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        padding = -hidden.shape[0] % (shards * self.vision.merge_area)
        lengths = (*frames.lengths, padding) if padding else frames.lengths
        hidden = pad(hidden, (0, 0, 0, padding))[:, None]
        table = pad(table, (0, 0, 0, 0, 0, padding))
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)

        features = self._run(hidden, table, lengths, device)
        return features[:, : frames.patches // self.vision.merge_area, 0]

    def dummy_batch(self, device: torch.device) -> tuple[torch.Tensor, Frames]:
        """The patches and frame of the smallest image, all zeros."""
        side = self.vision.spatial_merge_size
        return torch.zeros(side**2, self.vision.patch_dim, device=device), Frames(((1, side, side),), side)

    def dummy_forward(self, words: torch.Tensor) -> torch.Tensor | float:
        """Zero, in the dtype of `words`: of a batch of text too, every parameter gets a gradient.

        Megatron's overlapped gradient reduction waits for each parameter's gradient; without one it fails.
        """
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in self.parameters()):
            return 0.0
        return self(*self.dummy_batch(words.device)).sum().to(words.dtype) * 0.0

    def _run(
        self, hidden: torch.Tensor, table: torch.Tensor, lengths: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        levels = self.vision.deepstack_visual_indexes
        output = self.decoder(
            recomputable(hidden, self.decoder),
            attention_mask=None,
            rotary_pos_emb=table,
            packed_seq_params=PackedSegments.from_lengths(lengths, device),
            extract_layer_indices=set(levels),
        )
        last, between = output if levels else (output, [])
        merged = [self.merger(last)]
        # Features come in the order of the blocks; merger k belongs to the block that the config names k-th.
        for block, features in zip(sorted(levels), between, strict=True):
            merged.append(self.deepstack_merger_list[levels.index(block)](features))
        if self.config.sequence_parallel:
            # The tokens are put into embeddings that every rank holds whole, so each rank's gradient is whole too.
            merged = [
                gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.pg_collection.tp)
                for x in merged
            ]
        return torch.stack(merged)

    def _rotary_table(self, frames: Frames, device: torch.device) -> torch.Tensor:
        quarter = self.vision.hidden_size // self.vision.num_heads // 4
        frequencies = inverse_frequencies(quarter, ROPE_THETA, device).repeat(2)
        return rotary_table(frames.coordinates(device), [0] * quarter + [1] * quarter, frequencies)


def _init(module: torch.nn.Module, config: TransformerConfig) -> None:
    for name, parameter in module.named_parameters():
        if name == "bias":
            torch.nn.init.zeros_(parameter)
        elif config.init_method is not None:
            config.init_method(parameter)
