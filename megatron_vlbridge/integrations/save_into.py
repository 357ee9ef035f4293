"""Saving a live model into a folder that a framework has made, and where it may have put files of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.hf.side_files import QUANTISATION
from megatron_vlbridge.checkpoint.live import save_hf
from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks, rank_and_size
from megatron_vlbridge.checkpoint.live.shards import Model
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.stream.json_file import load_json_object
from megatron_vlbridge.errors import VLBridgeError

_WEIGHTS = (".safetensors", ".safetensors.index.json")


def save_into(
    model: Model,
    folder: str | Path,
    like: str | Path,
    *,
    weights_only: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """`save_hf`, with its `options`, to a folder that may exist; its other files are kept, unless `like` has them too.

    The checkpoint is written beside the folder, as `NAME.vlbridge-complete`, and its files are moved when it is
    complete. With `weights_only` those alone. All ranks must call it.

    Raises VLBridgeError, on all ranks, where the folder has weights already, where its `config.json`, which
    `weights_only` keeps, names a quantization, and where `save_hf` does.
    """
    target = Path(folder).resolve()
    with raise_on_all_ranks():
        first = rank_and_size()[0] == 0
        found = sorted(path.name for path in target.glob("*") if path.name.endswith(_WEIGHTS)) if first else []
        if found:
            raise VLBridgeError(
                f"{target}: expected a folder without weights, found {found[0]}. Use another folder, or remove them."
            )
        config = target / "config.json"
        if first and weights_only and config.is_file() and QUANTISATION in load_json_object(config):
            raise VLBridgeError(
                f"{config}: expected no {QUANTISATION}, as the weights are not quantized, found one. Remove it, and "
                "delete it from the config that the framework writes."
            )
    # Another rank may have made the folder, or not seen it yet.
    exists = gather(first and target.is_dir())[0]
    if not exists and not weights_only:
        save_hf(model, target, like, **(options or {}))
        return
    complete = target.with_name(f"{target.name}.vlbridge-complete")
    save_hf(model, complete, like, **(options or {}))
    with raise_on_all_ranks():
        if first:
            target.mkdir(parents=True, exist_ok=True)
            _move(complete, target, weights_only)


def _move(source: Path, target: Path, weights_only: bool) -> None:
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    weights = [path for path in paths if path.name.endswith(_WEIGHTS)]
    others = [] if weights_only else [path for path in paths if path not in weights and path.name != CHECKSUMS]
    sums = [] if weights_only else [source / CHECKSUMS]
    for path in (*others, *weights, *sums):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)
