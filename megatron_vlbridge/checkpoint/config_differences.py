"""In which fields two configs differ."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from megatron_vlbridge.config import Config

_COMPARED = ("architecture", "text", "vision", "tie_word_embeddings")


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
