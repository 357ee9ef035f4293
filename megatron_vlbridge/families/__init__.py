"""The supported architectures, one file each, as data."""

from __future__ import annotations

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import qwen3_vl, qwen3_vl_moe
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.families.family import Family

FAMILIES = (qwen3_vl.FAMILY, qwen3_vl_moe.FAMILY)

__all__ = ["FAMILIES", "ExpertForm", "Family", "find"]


def find(config: Config) -> Family:
    """The family that a config belongs to.

    Raises VLBridgeError, naming the architecture and the supported ones, where none does.

    Example: `find(read_config(folder)).table(config)` is the rule table of the checkpoint in `folder`.
    """
    for family in FAMILIES:
        if family.architecture == config.architecture:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise VLBridgeError(
        f"architecture: expected one that is supported ({supported}), found {config.architecture}, of which only the "
        "config.json can be read. Use a checkpoint of a supported architecture."
    )
