"""A loader of Energon's packs whose state can be saved, and restored where that gives the same packs."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlbridge.data.energon.task_encoder import ConversationTaskEncoder
from megatron_vlbridge.data.lengths.fingerprint import processor_values
from megatron_vlbridge.errors import VLBridgeError

try:
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
except ImportError as error:
    raise VLBridgeError(f"expected megatron-energon 7.4 or newer ({error}), from the extra energon") from error

REMEDIES = {
    "workers": "continue with this number of workers",
    "data-parallel size": "continue with this data-parallel size",
    "data-parallel rank": "give each data-parallel rank its own state",
    "packing buffer": "continue with this packing buffer",
    "shuffle buffer": "continue with this shuffle buffer",
    "sequence length": "continue with this --seq-length",
    "multiple of": "continue with this value",
    "energon": "install this version",
    "form": "continue with this form",
    "media options": "continue with these",
    "label options": "continue with these",
    "processor": "continue with the same processor",
    "dataset": "continue with the same shards and weights",
}


class PackLoader:
    """The packs of an Energon dataset or metadataset `path` for one data-parallel rank, without end.

    `rank` and `world_size` are those of the data-parallel group; all pipeline stages and tensor- and context-parallel
    ranks of a data-parallel rank must read the same packs, so they pass the same values. `packing_buffer` is the number
    of conversations that are packed at once, `shuffle_buffer` that of those among which the next one is drawn.

    `save_state` may be called between two packs, as by Megatron with `--dataloader-save`; it names all of the settings
    on which the order of packs depends.

    Example:
        >>> loader = PackLoader("meta.yaml", encoder, rank=0, world_size=1, workers=2)
        >>> packs = iter(loader)
        >>> vlm_step(packs, model)
        >>> state = loader.save_state()
    """

    def __init__(
        self,
        path: str | Path,
        encoder: ConversationTaskEncoder,
        *,
        rank: int,
        world_size: int,
        workers: int = 2,
        packing_buffer: int = 128,
        shuffle_buffer: int = 128,
    ) -> None:
        self._settings = {
            "workers": workers,
            "data-parallel size": world_size,
            "data-parallel rank": rank,
            "packing buffer": packing_buffer,
            "shuffle buffer": shuffle_buffer,
            "sequence length": encoder.seq_length,
            "multiple of": encoder.multiple_of,
            "energon": version("megatron-energon"),
            "form": encoder.form.name if encoder.form else "auto",
            "media options": str(replace(encoder.media, url_cache=None)),
            "label options": str(encoder.labels),
            "processor": _digest(processor_values(encoder.processor)),
        }
        dataset = get_train_dataset(
            str(path),
            worker_config=WorkerConfig(rank=rank, world_size=world_size, num_workers=workers),
            task_encoder=encoder,
            batch_size=1,
            packing_buffer_size=packing_buffer,
            shuffle_buffer_size=shuffle_buffer,
            max_samples_per_sequence=packing_buffer,
        )
        self._loader = get_savable_loader(dataset)
        self._settings["dataset"] = _digest(_contents(self._loader.config()))
        self._started = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._started = True
        return iter(self._loader)

    def save_state(self) -> dict[str, Any]:
        """What `restore_state` needs to continue after the last pack; `torch.save` can write it."""
        return {"settings": self._settings, "state": self._loader.save_state_rank()}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Continue as the loader that was saved, with the same packs in the same order.

        Raises VLBridgeError: the state is of other settings (Energon cannot continue with another number of workers or
        ranks) or of a dataset with other shards, it is not a state of `save_state`, or packs were already read.
        """
        if self._started:
            raise VLBridgeError("Energon: a state is restored before the first pack is read; make a new PackLoader")
        if not isinstance(state, dict) or state.keys() != {"settings", "state"}:
            raise VLBridgeError(f"Energon: expected a state of PackLoader.save_state, found {type(state).__name__}")
        for name, found in self._settings.items():
            expected = state["settings"].get(name)
            if found != expected:
                raise VLBridgeError(
                    f"Energon: {name}: expected {expected}, that of the saved state, found {found}; "
                    f"{REMEDIES[name]}, or start the data from the beginning"
                )
        self._loader.restore_state_rank(state["state"])


def _contents(value: Any) -> Any:
    """The settings of an Energon dataset without its paths (their names begin with `_`), with the places in shards."""
    if isinstance(value, dict):
        kept = {name: _contents(one) for name, one in value.items() if not name.startswith("_")}
        index = Path(f"{value.get('_path')}.idx")  # where each sample begins
        return kept | ({"places": hashlib.sha256(index.read_bytes()).hexdigest()} if index.is_file() else {})
    return [_contents(one) for one in value] if isinstance(value, list | tuple) else value


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:12]
