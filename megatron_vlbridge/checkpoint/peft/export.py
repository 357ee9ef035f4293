"""The adapters that a training run saved, as a folder of `peft`."""

from pathlib import Path

from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.peft.adapter import base_shapes
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig
from megatron_vlbridge.checkpoint.peft.manifest import ADAPTER_MANIFEST, read_adapter_manifest
from megatron_vlbridge.checkpoint.peft.writer import write_adapter
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.weights import Plan, Region
from megatron_vlbridge.weights.adapters import HALVES, adapter_table, adapter_tensor
from megatron_vlbridge.weights.plan import any_dtype


def export_adapter(run: str | Path, target: str | Path, like: str | Path | None = None) -> Path:
    """Write the adapters in a `torch_dist` checkpoint of a run with `--lora-rank` as a folder that `peft` loads.

    `like` is the Hugging Face folder or Hub id of the base (default: the run's `--hf-folder`), which the new folder
    names; of it only the config is read. All adapters are held in memory meanwhile. The folder appears under its name
    when it is complete. Gives the new folder.

    Raises VLBridgeError, naming file and tensor: the run saved no adapters, they do not fit the base, a file is
    damaged, or the folder is taken or cannot be written.
    Example: `export_adapter("run", "adapter", "Qwen/Qwen3-VL-2B-Instruct")`.
    """
    source = TorchDistFolder(run)
    manifest = read_adapter_manifest(source.folder)
    if manifest is None:
        raise VLBridgeError(
            f"{source.folder}: expected adapters, described by {ADAPTER_MANIFEST}, found no such file. Only runs with "
            "--lora-rank save adapters; export others without --adapter."
        )
    base = str(like or manifest.base)
    config = read_config(find_folder(base, weights=False))
    shapes = base_shapes(config)
    if unknown := [weight for weight in manifest.weights if weight not in shapes]:
        raise VLBridgeError(
            f"{source.folder}: expected adapters of weights of {base}, found one of {unknown[0]}. Give the base that "
            "they were trained on."
        )
    table = adapter_table(shapes, manifest.weights, manifest.rank)
    Plan(
        table,
        any_dtype(table.hf_shapes),
        source.table,
        cast=True,
        hf_source=f"adapters of {base}",
        megatron_source=str(source.folder),
    )
    pairs = {}
    for weight in manifest.weights:
        names = [adapter_tensor(weight, half) for half in HALVES]
        a, b = (source.read(Region.whole(name, table.hf_shapes[name])) for name in names)
        pairs[weight] = a, b
    write_adapter(Path(target), base, AdapterConfig(manifest.rank, manifest.alpha), pairs)
    return Path(target)
