"""The rotary settings of a part, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4.57)."""

from megatron_vlbridge.config.section import Section


def read_rope(text: Section) -> tuple[float, tuple[int, int, int], float]:
    """`(rope_theta, mrope_section, partial_rotary_factor)` of the language model."""
    rope = rope_section(text)
    rope.only("rope_type", "default")
    rope.only("type", "default")
    rope.only("mrope_interleaved", True)
    theta = rope.number("rope_theta", default=text.number("rope_theta"))
    section = rope.integers("mrope_section", default=text.defaults["mrope_section"])
    if len(section) != 3:
        raise rope.fail("mrope_section", list(section), "three integers (time, height, width)", "Correct the value.")
    factor = rope.number("partial_rotary_factor", default=text.number("partial_rotary_factor", default=1.0))
    return theta, (section[0], section[1], section[2]), factor


def rope_section(part: Section) -> Section:
    """`rope_parameters` and `rope_scaling` of a part, merged; they and the keys beside them must agree."""
    new, old = part.section("rope_parameters", required=False), part.section("rope_scaling", required=False)
    for key, value in old.values.items():
        if key in new.values and new.values[key] != value:
            raise old.fail(key, value, f"{new.values[key]!r} as in rope_parameters", "Remove the wrong one.")
    prefix = part.prefix + ("rope_parameters." if new.values else "rope_scaling.")
    rope = Section(part.file, {**old.values, **new.values}, prefix)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope.values and part.values.get(key) not in (None, rope.values[key]):
            raise part.fail(
                key, part.value(key), f"{rope.values[key]!r} as in {rope.prefix}{key}", "Remove the wrong one."
            )
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.fail(key, value, "one setting for all layers", "Settings of single layers are not supported.")
    return rope
