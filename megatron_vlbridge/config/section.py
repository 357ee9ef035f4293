"""One JSON object of a file, read key by key; every error names file, key, value, what was expected and a remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlbridge.errors import VLBridgeError

# Each has rules of its own, which are made before a tensor is read: an untrusted value must not fill the memory.
MAX_LAYERS = MAX_EXPERTS = 1000
_LARGEST = 2**63 - 1


class Section:
    """One JSON object of the file. Every getter checks the type and names file and key in its error.

    An absent key has the value that it has in `defaults`, else the argument `default` of the getter.
    """

    def __init__(
        self, file: Path, values: Mapping[str, Any], prefix: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.file, self.values, self.prefix, self.defaults = file, values, prefix, defaults or {}

    def fail(
        self, key: str, found: object, expected: str, remedy: str = "Correct the value in the file."
    ) -> VLBridgeError:
        """An error that names file, key, what was found and expected, and what to do."""
        return VLBridgeError(f"{self.file}: {self.prefix}{key}: expected {expected}, found {found!r}. {remedy}")

    def value(self, *keys: str, default: Any = None) -> Any:
        """The value under whichever alias is present; two that are must agree. JSON null counts as absent."""
        present = [key for key in keys if self.values.get(key) is not None]
        for key in present[1:]:
            if self.values[key] != self.values[present[0]]:
                expected = f"the value of {self.prefix}{present[0]}, {self.values[present[0]]!r}"
                raise self.fail(key, self.values[key], expected, "Both name one setting: remove the wrong one.")
        return self.values[present[0]] if present else self.defaults.get(keys[0], default)

    def integer(self, *keys: str, default: Any = None, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """An integer of at least `minimum` and at most `maximum`."""
        value = self.value(*keys, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            most = f" and at most {maximum}" if isinstance(value, int) and value > maximum else ""
            raise self.fail(keys[0], value, f"an integer of at least {minimum}{most}")
        return value

    def number(self, *keys: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number as a float: positive, or not negative."""
        value = self.value(*keys, default=default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not numeric or value < 0 or (positive and value == 0):
            sign = "positive" if positive else "non-negative"
            raise self.fail(keys[0], value, f"a {sign} number")
        return float(value)

    def integers(self, key: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """A list of non-negative integers, as a tuple."""
        value = self.value(key, default=default)
        if not isinstance(value, list | tuple) or any(
            not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= _LARGEST for item in value
        ):
            raise self.fail(key, value, "a list of non-negative integers")
        return tuple(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false, and nothing that resembles them."""
        value = self.value(key, default=default)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def only(self, key: str, *allowed: object) -> None:
        """Reject any value but these; an absent key means the first."""
        value = self.value(key, default=allowed[0])
        if not any(value == item and type(value) is type(item) for item in allowed):
            expected = " or ".join(json.dumps(item) for item in allowed)
            remedy = "Other values are not supported: use a checkpoint without this setting."
            raise self.fail(key, value, expected, remedy)

    def section(self, key: str, required: bool = True, defaults: Mapping[str, Any] | None = None) -> Section:
        """The JSON object under `key`, whose keys have these defaults; an optional one that is absent is empty."""
        value = self.values.get(key)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(key, value, "a JSON object", "Use the config.json that belongs to the checkpoint.")
        return Section(self.file, value, f"{self.prefix}{key}.", defaults)


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
