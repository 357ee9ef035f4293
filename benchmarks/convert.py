"""Import and export of checkpoints with real shapes, compared with `cp` + `sync` of the same bytes and transformers.

    python benchmarks/convert.py --folder /some/disk             # all parts: 60 GB of disk, about 8 minutes
    python benchmarks/convert.py 2B transformers --folder /some/disk

Prints the tables of docs/convert.md. Parts:

    2B, 8B        import and export of random bits in the shapes of tests/data/configs
    experts       the same with 128 experts per layer: 30B-A3B, by default with 3 of its 48 layers
    transformers  `from_pretrained` and `save_pretrained` of 2B
    235B          the plan of an import from headers, fused and with one tensor per expert; the files are sparse

Each step runs in its own process with its source dropped from the page cache, and ends with `sync`; importing torch is
not included. `cp` runs before and after each step, and the ratio is to their mean. Memory is the peak of RssAnon above
that of the bare interpreter, including torch. Exit code 1 if import and export changed a byte.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from safetensors.torch import save_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.hf.writer import plan_shards
from megatron_vlbridge.families import ExpertForm, find
from megatron_vlbridge.weights import TensorSpec

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
SHARD_BYTES = 5 * 10**9
PARTS = {
    "2B": "Qwen3-VL-2B-Instruct",
    "8B": "Qwen3-VL-8B-Instruct",
    "experts": "Qwen3-VL-30B-A3B-Instruct",
    "transformers": "Qwen3-VL-2B-Instruct",
    "235B": "Qwen3-VL-235B-A22B-Instruct",
}
COPIES = 3  # source, result, and the export or a copy, are on the disk at the same time

# A step in its own process: samples the memory while it runs, prints seconds and bytes.
STEP = """
import json, os, re, threading, time
from pathlib import Path
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
{imports}
begin = time.perf_counter()
{work}
os.sync()
seconds = time.perf_counter() - begin
done = True
watcher.join()
print(json.dumps([seconds, peak - start]))
"""
CONVERT = "from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint\n"
CONVERT += "from megatron_vlbridge.checkpoint.import_plan import plan_import\n"
CONVERT += "from megatron_vlbridge.checkpoint.stream.engine import Options"
TRANSFORMERS = "import torch\nfrom transformers import AutoModelForImageTextToText as Auto"


def describe(folder: Path, name: str, layers: int | None, form: ExpertForm | None = None) -> dict[str, TensorSpec]:
    """Write the config of a model, optionally with fewer layers; returns its tensors in bfloat16."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    if layers is not None:
        values["text_config"]["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    config = read_config(folder)
    shapes = find(config).table(config, form).hf_shapes
    return {key: TensorSpec(shape, torch.bfloat16) for key, shape in shapes.items()}


def shard(specs: dict[str, TensorSpec], folder: Path) -> dict[str, list[str]]:
    """Map each file to its tensors; writes the index if there are several files."""
    files = plan_shards(specs, SHARD_BYTES)
    if len(set(files.values())) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return {file: [key for key, place in files.items() if place == file] for file in dict.fromkeys(files.values())}


def make_random(folder: Path, specs: dict[str, TensorSpec]) -> int:
    """Write random bits; returns their number of bytes."""
    random = torch.Generator().manual_seed(0)
    for file, keys in shard(specs, folder).items():
        tensors = {}
        for key in keys:
            bits = torch.empty(-(-specs[key].nbytes // 8), dtype=torch.int64).random_(generator=random)
            tensors[key] = bits.view(torch.uint8)[: specs[key].nbytes].view(torch.bfloat16).view(specs[key].shape)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return sum(spec.nbytes for spec in specs.values())


def make_sparse(folder: Path, specs: dict[str, TensorSpec]) -> int:
    """Write headers and sparse data; returns the number of bytes described by the headers."""
    for file, keys in shard(specs, folder).items():
        tensors = {key: specs[key] for key in keys}
        header = encode_header(tensors)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.nbytes for spec in tensors.values()))
    return sum(spec.nbytes for spec in specs.values())


def drop_from_cache(folder: Path) -> None:
    """Drop the files from the page cache, so that each step reads them from disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> float:
    """The seconds that `cp` and `sync` take."""
    drop_from_cache(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def step(source: Path, imports: str, work: str) -> tuple[float, int]:
    """The seconds and the peak memory of one step that reads `source`."""
    drop_from_cache(source)
    command = [sys.executable, "-c", STEP.format(imports=imports, work=work)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(out.splitlines()[-1])
    return seconds, peak


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


@dataclass(frozen=True)
class Run:
    """One run of a step: seconds, peak memory in bytes, the seconds of the `cp` before and of the one after."""

    seconds: float
    peak: int
    copies: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The time over the mean of both copies."""
        return self.seconds / mean(self.copies)


def print_row(what: str, nbytes: int, runs: Sequence[Run]) -> None:
    """Medians of all runs, but the largest peak of memory."""
    ratios = sorted(run.ratio for run in runs)
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(runs) > 1 else ""
    row(
        what,
        f"{nbytes / 1e9:.2f} GB",
        f"{median(run.seconds for run in runs):.1f} s",
        f"{median(mean(run.copies) for run in runs):.1f} s",
        f"{median(ratios):.2f}{spread}",
        mebibytes(max(run.peak for run in runs)),
        f"{os.getloadavg()[0]:.0f}",
    )


def title_of(part: str, layers: int | None) -> str:
    return PARTS[part] + (f", {layers} layers" if layers is not None else "")


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


@contextmanager
def temporary_folder(folder: str | None, needed: int) -> Iterator[Path]:
    """A temporary folder on a disk with enough free space."""
    work = Path(tempfile.mkdtemp(prefix="benchmark-convert-", dir=folder))
    try:
        free = shutil.disk_usage(work).free
        if free < needed:
            sys.exit(f"{work.parent}: expected {needed / 1e9:.0f} GB free, found {free / 1e9:.0f} GB; use another disk")
        yield work
    finally:
        shutil.rmtree(work)


def round_trip(part: str, args: argparse.Namespace) -> bool:
    """Import and export; returns whether the files are identical."""
    layers = args.layers if args.layers is not None else 3 if part == "experts" else None
    with temporary_folder(args.folder, 0) as work:
        specs = describe(work / "hf", PARTS[part], layers)
    with temporary_folder(args.folder, COPIES * sum(spec.nbytes for spec in specs.values())) as work:
        source, megatron, back, spare = (work / name for name in ("hf", "megatron", "back", "spare"))
        nbytes = make_random(source, describe(source, PARTS[part], layers))
        title = title_of(part, layers)
        options = f"options=Options(workers={args.workers}, memory={args.memory})"
        imports, exports, same = [], [], True
        after = copy(source, spare)
        for _ in range(args.runs):
            before = after
            result = step(source, CONVERT, f"import_checkpoint({str(source)!r}, {str(megatron)!r}, {options})")
            between = copy(source, spare)
            imports.append(Run(*result, (before, between)))
            result = step(megatron, CONVERT, f"export_checkpoint({str(megatron)!r}, {str(back)!r}, {options})")
            shutil.rmtree(megatron)
            same = same and all(files_are_equal(path, back / path.name) for path in source.glob("*.safetensors"))
            shutil.rmtree(back)
            after = copy(source, spare)
            exports.append(Run(*result, (between, after)))
        print_row(f"{title}: import", nbytes, imports)
        print_row(f"{title}: export" + ("" if same else " (DIFFERENT)"), nbytes, exports)
    return same


def through_transformers(args: argparse.Namespace) -> bool:
    """Load and save with transformers."""
    with temporary_folder(args.folder, 0) as work:
        source, spare = work / "hf", work / "spare"
        nbytes = make_random(source, describe(source, PARTS["transformers"], args.layers))
        load = f"Auto.from_pretrained({str(source)!r}, dtype=torch.bfloat16).save_pretrained({str(spare)!r})"
        runs = []
        after = copy(source, spare)
        for _ in range(args.runs):
            before = after
            result = step(source, TRANSFORMERS, load)
            shutil.rmtree(spare)
            after = copy(source, spare)
            runs.append(Run(*result, (before, after)))
        print_row(f"{title_of('transformers', args.layers)}: transformers", nbytes, runs)
    return True


def plan_large(args: argparse.Namespace) -> bool:
    """Plan the import of files with headers and sparse data."""
    for form in (ExpertForm.FUSED_IN_OUT, ExpertForm.PER_EXPERT):
        with temporary_folder(args.folder, 0) as work:
            specs = describe(work / "hf", PARTS["235B"], args.layers, form)
            nbytes = make_sparse(work / "hf", specs)
            seconds, peak = step(work / "hf", CONVERT, f"plan_import({str(work / 'hf')!r}, {str(work / 'spare')!r})")
        title = f"{title_of('235B', args.layers)}: plan, {form}, {len(specs)} tensors"
        row(title, f"{nbytes / 1e9:.2f} GB", f"{seconds:.1f} s", "", "", mebibytes(peak), f"{os.getloadavg()[0]:.0f}")
    return True


def files_are_equal(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "--silent", a, b], check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all", metavar="PART")
    parser.add_argument(
        "--folder", help="folder for temporary files; needs three times the size of the largest checkpoint"
    )
    parser.add_argument("--layers", type=int, help="fewer layers of the language models")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runs", type=int, default=1, help="print the medians of so many runs of each conversion")
    parser.add_argument("--memory", type=int, default=2**30, help="bytes")
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    row("", "bytes", "time", "`cp` + `sync`", "ratio", "peak memory", "load")
    row(*["---"] * 7)
    others = {"transformers": through_transformers, "235B": plan_large}
    good = [others[part](args) if part in others else round_trip(part, args) for part in args.parts or PARTS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
