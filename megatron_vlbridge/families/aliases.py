"""The names that published checkpoints, older tools and wrapped models give to the same tensors, as data.

Everywhere else a tensor has the name that the Hub gives it: `model.language_model.*`, `model.visual.*`, `lm_head.*`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True)
class Part:
    """One part of the model: the prefix of its names on the Hub, its prefixes elsewhere, and the words that follow."""

    hub: str
    others: tuple[str, ...]
    words: tuple[str, ...]


PARTS = (
    Part(
        "model.language_model.",
        ("model.language_model.model.", "language_model.model.", "language_model.", "model.", ""),
        ("embed_tokens", "layers", "norm"),
    ),
    Part("model.visual.", ("visual.", ""), ("patch_embed", "pos_embed", "blocks", "merger", "deepstack_merger_list")),
    Part("lm_head.", ("language_model.lm_head.", "model.lm_head."), ("weight",)),
)
MODULES = {
    f".self_attn.{other}.": f".self_attn.{hub}."
    for other, hub in (
        *(("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "o_proj")),
        *(("norm_q", "q_norm"), ("norm_k", "k_norm")),
    )
}
"""Diffusers' names of the modules of an attention -> the Hub's."""
WRAPPERS = ("module.",)
"""The prefix that a wrapper around the whole model adds to every name."""


def strip_wrappers(names: Sequence[str], wrappers: Sequence[str] = WRAPPERS) -> str:
    """The prefix that every one of the names has before its own, such as `module.`; empty where there is none."""
    found = ""
    while names and (more := next((w for w in wrappers if all(n.startswith(found + w) for n in names)), "")):
        found += more
    return found


def hub_names(names: Iterable[str], source: str) -> tuple[dict[str, str], list[str]]:
    """Name -> the Hub's name for it, and notes on the names that differ from the Hub's.

    A name that belongs to no part stays as it is. `source` names the folder in errors.

    Raises VLBridgeError, naming two tensors, where the names of one part have two prefixes, or two are one tensor's.
    Example: `hub_names(["visual.pos_embed.weight"], "old")[0]` is
    `{"visual.pos_embed.weight": "model.visual.pos_embed.weight"}`.
    """
    names = list(names)
    wrapper = strip_wrappers(names)
    parts = {name: _find_part(name.removeprefix(wrapper)) for name in names}
    prefixed = {part for part, prefix in parts.values() if prefix}
    first: dict[Part, tuple[str, str]] = {}
    result = {}
    for name, (part, prefix) in parts.items():
        inner = name.removeprefix(wrapper)
        # Beside names with a prefix, one without is not of the part: `merger.extra` is no tensor of the tower.
        if part is not None and (prefix or part not in prefixed):
            known, other = first.setdefault(part, (prefix, name))
            if known != prefix:
                raise VLBridgeError(
                    f"{source}: expected one prefix for all names of {part.hub}*, found {other} and {name}. "
                    "The folder holds two checkpoints: remove the files of one."
                )
            inner = part.hub + inner.removeprefix(prefix)
            for other, hub in MODULES.items():
                inner = inner.replace(other, hub)
        result[name] = inner
    modules = sorted({word for word in MODULES for name in names if word in name and word not in result[name]})
    _check_unique(result, source)
    prefixes = {part.hub: wrapper + prefix for part, (prefix, _) in first.items()}
    notes = [
        f"names {found}* are read as {hub}*" if found else f"names without a prefix are read as {hub}*"
        for hub, found in prefixes.items()
        if found != hub
    ]
    return result, [*notes, *(f"names *{word}* are read as *{MODULES[word]}*" for word in modules)]


def _check_unique(hub: Mapping[str, str], source: str) -> None:
    seen: dict[str, str] = {}
    for name, known in hub.items():
        if (other := seen.setdefault(known, name)) != name:
            raise VLBridgeError(
                f"{source}: expected one tensor for {known}, found {other} and {name}. "
                "The folder holds two checkpoints: remove the files of one."
            )


_PATTERNS = [
    (re.compile(rf"{re.escape(prefix)}({'|'.join(part.words)})(?![a-z0-9])"), part, prefix)
    for part in PARTS
    for prefix in (part.hub, *part.others)
]


def _find_part(name: str) -> tuple[Part | None, str]:
    """The part that a name belongs to, and the prefix by which it does."""
    return next(((part, prefix) for pattern, part, prefix in _PATTERNS if pattern.match(name)), (None, ""))
