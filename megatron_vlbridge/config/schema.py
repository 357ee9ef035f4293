"""What a checkpoint is: frozen dataclasses, whatever the keys of the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes of unquantised weights, by their names in `config.json` and in torch."""


@dataclass(frozen=True)
class MoeConfig:
    """The experts of the language model; `shared_expert_intermediate_size` is 0 when there is no shared expert."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    router_aux_loss_coef: float

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (counted from 0) has experts instead of a dense MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True)
class LinearAttentionConfig:
    """The gated-delta-rule layers; `layer_types` names each decoder layer `linear_attention` or `full_attention`."""

    layer_types: tuple[str, ...]
    conv_kernel_dim: int
    key_head_dim: int
    value_head_dim: int
    num_key_heads: int
    num_value_heads: int


@dataclass(frozen=True)
class LayerKind:
    """What a layer is made of: linear or full attention, experts or a dense MLP."""

    linear_attention: bool = False
    experts: bool = False

    def __str__(self) -> str:
        attention = "linear attention" if self.linear_attention else "full attention"
        return f"{attention} and {'experts' if self.experts else 'a dense MLP'}"


@dataclass(frozen=True)
class TextConfig:
    """The language model. `intermediate_size` is that of dense MLPs, 0 where a family has none.

    `num_mtp_layers` is the number of MTP layers after the decoder, which predict the token after the next one (0 or 1).
    `pad_token_id`: the token whose embedding gets no gradient where it is in the input.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    partial_rotary_factor: float
    max_position_embeddings: int
    initializer_range: float
    attention_output_gate: bool = False
    num_mtp_layers: int = 0
    pad_token_id: int | None = None
    moe: MoeConfig | None = None
    linear_attention: LinearAttentionConfig | None = None

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_experts(self) -> int:
        """Of each layer that has experts; 0 where none has."""
        return self.moe.num_experts if self.moe else 0

    @property
    def moe_intermediate_size(self) -> int:
        """That of an expert; 0 where there are none."""
        return self.moe.moe_intermediate_size if self.moe else 0

    @property
    def num_linear_key_heads(self) -> int:
        """Of each layer with linear attention; 0 where none has."""
        return self.linear_attention.num_key_heads if self.linear_attention else 0

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What each decoder layer is made of."""
        linear = self.linear_attention.layer_types if self.linear_attention else ("full_attention",) * self.num_layers
        return tuple(
            LayerKind(kind == "linear_attention", self.moe is not None and self.moe.is_moe_layer(layer))
            for layer, kind in enumerate(linear)
        )

    @property
    def mtp_layer_kind(self) -> LayerKind:
        """What an MTP layer is made of: full attention, and experts where the model has any."""
        return LayerKind(experts=self.moe is not None)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes of patches are in pixels and frames."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    initializer_range: float

    @property
    def patch_dim(self) -> int:
        """Values in one row of `pixel_values`: channels x frames x height x width of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_area(self) -> int:
        """How many patches the merger joins into one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class Config:
    """A vision-language checkpoint: its architecture, its two parts and what joins them.

    `fp8`: weights are stored in 8 bits, with a scale for each block of 128 x 128, and represent values of `dtype`.
    """

    architecture: str
    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    dtype: str
    fp8: bool = False


@dataclass(frozen=True)
class ConfigFormat:
    """The `config.json` of one model type.

    `text` and `vision` hold, for each key of `text_config` and `vision_config` that the reader looks for, what
    transformers 5.23 takes where it is absent. A key that is not here is one that the model type does not have: with
    `num_experts` it has experts, with `full_attention_interval` linear attention, and so on. `tokens` are the defaults
    of the tokens image, video, vision start and vision end. `parts_model_type` is the model type whose text and vision
    configs it has, where that is another; `other_architectures` are further names of the architecture.
    `in_transformers_4` tells whether transformers 4.57 has the model type too.
    """

    model_type: str
    architecture: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: tuple[int, int, int, int]
    parts_model_type: str = ""
    other_architectures: tuple[str, ...] = ()
    in_transformers_4: bool = False
