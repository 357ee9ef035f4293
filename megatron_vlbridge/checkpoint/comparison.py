"""What a comparison found, and in which fields two configs differ."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

from megatron_vlbridge.config import Config

_COMPARED = ("architecture", "text", "vision", "tie_word_embeddings")


@dataclass(frozen=True)
class Difference:
    """One tensor or file that is not the same, and how."""

    name: str
    text: str


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison of `a` with `b`: how much was compared, and every difference, the first one first."""

    a: str
    b: str
    compared: int
    nbytes: int
    differences: tuple[Difference, ...]
    unit: str = "tensors"

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not self.differences


def config_differences(left: Config, right: Config) -> Iterator[tuple[str, object, object]]:
    """Each field in which two models differ, as `text.num_layers`, with both values.

    Fields that say how weights are stored, or which tokens stand for images, are not compared.
    """
    for name in _COMPARED:
        yield from _differences(name, getattr(left, name), getattr(right, name))


def _differences(name: str, left: object, right: object) -> Iterator[tuple[str, object, object]]:
    if is_dataclass(left) and type(left) is type(right):
        for field in fields(left):
            yield from _differences(f"{name}.{field.name}", getattr(left, field.name), getattr(right, field.name))
    elif left != right:
        yield name, left, right
