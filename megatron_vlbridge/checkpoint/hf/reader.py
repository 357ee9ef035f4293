"""Folders of safetensors files, read without trust in any header."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.hf.fp8 import BlockScaled, pair_scales
from megatron_vlbridge.checkpoint.hf.header import read_header
from megatron_vlbridge.checkpoint.stream.json_file import is_file_path, load_json_object
from megatron_vlbridge.checkpoint.stream.raw import Stored
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.aliases import hub_names
from megatron_vlbridge.weights import Region

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN = 8


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one file, or shards that an index names.

    `table` maps each tensor to its shape and dtype, `files` to the file it lies in; `paths` are all files. Tensors have
    the names of the Hub, however the files spell them, and weights in 8 bits with scales (`fp8.py`) are read as
    bfloat16: `renamed` says in words which names differ, `scaled` are the names of such weights. Opening reads headers
    only and checks them against the file sizes and the index. Shards that are symlinks are followed, as the Hub's cache
    stores them so.

    Raises VLBridgeError, naming file and tensor, for a missing, truncated or malformed file, an index entry that points
    nowhere or out of the folder, a tensor that is there twice or in two spellings, and scales that fit no weight.
    Example: `SafetensorsFolder("Qwen3-VL-2B-Instruct").read(Region("lm_head.weight", (0, 0), (8, 2048)))`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = self._read_index()
        headers = {file: read_header(self.folder / file) for file in dict.fromkeys(self.files.values())}
        if not self.files:
            file = self._single_file()
            headers = {file: read_header(self.folder / file)}
            self.files = dict.fromkeys(headers[file], file)
        file_of = {self.folder / file: file for file in headers}
        self.paths = tuple(file_of)
        found: dict[str, Stored] = {}
        for file, header in headers.items():
            found |= self._check_places(file, header)
        for name in self.files.keys() - found.keys():
            raise self._error(
                self.files[name],
                f"expected tensor {name}, as the index says, found none of this name",
                "Fetch both again.",
            )
        names, self.renamed = hub_names(found, str(self.folder))
        self._stored = pair_scales({names[name]: stored for name, stored in found.items()})
        self.table = {name: stored.spec for name, stored in self._stored.items()}
        # In the order of the data, so that who writes the same shards again writes the same bytes.
        order = (names[name] for header in headers.values() for name in header)
        self.files = {name: file_of[self._stored[name].path] for name in order if name in self._stored}
        self.scaled = tuple(name for name, stored in self._stored.items() if isinstance(stored, BlockScaled))

    @property
    def as_on_the_hub(self) -> bool:
        """Whether the files hold what `table` says, under these names."""
        return not self.renamed and not self.scaled

    @property
    def notes(self) -> list[str]:
        """What is read otherwise than the files have it."""
        scaled = [f"FP8 weights, dequantised to bfloat16 by their scales: {listed(self.scaled)}"] if self.scaled else []
        return [*self.renamed, *scaled]

    def check_scales(self) -> None:
        """Read the scales of all 8-bit weights; raises VLBridgeError for one that is not positive and finite."""
        for name in self.scaled:
            stored = self._stored[name]
            assert isinstance(stored, BlockScaled)
            with self._reading(name, stored.name):
                stored.check_scales()

    def read(self, region: Region) -> torch.Tensor:
        """The values of a region, as stored."""
        part = torch.empty(region.shape, dtype=self.table[region.name].dtype)
        self.read_into(region, part)
        return part

    def read_into(self, region: Region, out: torch.Tensor) -> None:
        """Copy the values of a region into a tensor of its shape, converted to the tensor's dtype."""
        with self._reading(region.name, str(region)):
            self._stored[region.name].read_into(region.offset, out)

    @contextmanager
    def _reading(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"expected to read {what}, found: {error}"
            raise self._error(self.files[name], text, "Fetch the file again.") from error

    def _error(self, file: str, text: str, remedy: str) -> VLBridgeError:
        return VLBridgeError(f"{self.folder / file}: {text}. {remedy}")

    def _check_places(self, file: str, header: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """The tensors of one file, which must be those that the index has there."""
        for name in header:
            place = self.files.get(name)
            if place is None:
                raise self._error(
                    file, f"expected only tensors that the index names, found {name}", "Fetch both again."
                )
            if place != file:
                raise self._error(file, f"expected {name} only in {place}, found it here too", "Remove the wrong copy.")
        return header

    def _single_file(self) -> str:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if SINGLE in found:
            return SINGLE
        if len(found) == 1:
            return found[0]
        raise VLBridgeError(
            f"{self.folder}: expected {INDEX} or one safetensors file, found {', '.join(found) or 'neither'}. "
            "Give a folder with a complete Hugging Face checkpoint."
        )

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file from the index; empty when there is none."""
        found = sorted(path.name for path in self.folder.glob("*.safetensors.index.json"))
        if not found:
            return {}
        if len(found) > 1 and INDEX not in found:
            raise VLBridgeError(f"{self.folder}: expected one index, found {', '.join(found)}. Remove the wrong ones.")
        path = self.folder / (INDEX if INDEX in found else found[0])
        index = load_json_object(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise VLBridgeError(
                f"{path}: weight_map: expected tensor names with their files, found {weight_map!r:.80}."
            )
        for name, file in weight_map.items():
            if not is_file_path(file, ".safetensors"):
                raise VLBridgeError(
                    f"{path}: {name}: expected the name of a safetensors file in this folder, found {file!r}. "
                    "Fetch the index again from a source that you trust."
                )
            if not (self.folder / file).is_file():
                raise VLBridgeError(f"{path}: {name}: expected in {file}, found no such file. Fetch {file}.")
        if (self.folder / SINGLE).exists() and SINGLE not in weight_map.values():
            raise VLBridgeError(
                f"{self.folder / SINGLE}: expected no file of this name beside {path.name}, which does not name it: "
                "other tools read the one where this reads the other. Remove one of the two."
            )
        return weight_map


def listed(names: Sequence[str]) -> str:
    """`2 tensors: a, b`, the first few by name."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}: {', '.join(names[:_SHOWN])}{more}"
