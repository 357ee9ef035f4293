"""`vision_config` -> `VisionConfig`."""

import math

from megatron_vlbridge.config.schema import VisionConfig
from megatron_vlbridge.config.section import MAX_LAYERS, Section, rope_section

_SIZES = (
    *("hidden_size", "intermediate_size", "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size"),
    *("out_hidden_size", "num_position_embeddings"),
)


def read_vision(vision: Section, model_type: str) -> VisionConfig:
    """The vision tower of a checkpoint of `model_type`."""
    vision.only("model_type", f"{model_type}_vision", model_type)
    vision.only("hidden_act", "gelu_pytorch_tanh")
    vision.only("per_layer_config", None)
    rope = rope_section(vision)
    rope.only("rope_type", "axial", "default")
    rope.only("type", "default", "axial")
    for part in (rope, vision):
        if part.number("rope_theta", default=10000.0) != 10000.0:
            raise part.fail("rope_theta", part.value("rope_theta"), "10000", "Other values are not supported.")
    result = VisionConfig(
        depth=_read_size_of_two_names(vision, "depth", "num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=_read_size_of_two_names(vision, "num_heads", "num_attention_heads"),
        **{name: vision.integer(name) for name in _SIZES},
        deepstack_visual_indexes=vision.integers("deepstack_visual_indexes", default=[]),
        initializer_range=vision.number("initializer_range", positive=False),
    )
    _check_vision(vision, result)
    if "deepstack_visual_indexes" not in vision.defaults and result.deepstack_visual_indexes:
        found = list(result.deepstack_visual_indexes)
        raise vision.fail("deepstack_visual_indexes", found, "[]", "This family has no deepstack.")
    return result


def _read_size_of_two_names(vision: Section, name: str, other: str, **limits: int) -> int:
    """A size that transformers 5.23 reads under both names, where 5.8 takes its default if `name` is missing."""
    if vision.values.get(name) is None and vision.values.get(other) is not None:
        remedy = "Not every transformers reads this one: rename it."
        raise vision.fail(other, vision.value(other), f"the same under the name {name}", remedy)
    return vision.integer(name, other, **limits)


def _check_vision(vision: Section, result: VisionConfig) -> None:
    # A quarter of a head's frequencies each for cos/sin of height and width.
    if result.hidden_size % (4 * result.num_heads):
        expected = f"a multiple of 4 x num_heads ({4 * result.num_heads})"
        raise vision.fail("hidden_size", result.hidden_size, expected, "Correct hidden_size or num_heads.")
    vision.only("head_dim", result.hidden_size // result.num_heads)
    if math.isqrt(result.num_position_embeddings) ** 2 != result.num_position_embeddings:
        found = result.num_position_embeddings
        raise vision.fail("num_position_embeddings", found, "a square number")
    indexes = result.deepstack_visual_indexes
    if len(set(indexes)) != len(indexes) or any(index >= result.depth for index in indexes):
        expected = f"distinct indexes of blocks below depth ({result.depth})"
        raise vision.fail("deepstack_visual_indexes", list(indexes), expected)
