"""Import and export of a checkpoint of real shapes beside `cp` + `sync` of the same bytes, and beside transformers.

    python benchmarks/convert.py Qwen3-VL-2B-Instruct --folder /some/disk

Random weights in the shapes of tests/data/configs; `--layers` takes fewer. Each step runs in a process of its own, with
the source dropped from the page cache, and ends with `sync`; starting Python and importing torch is not counted. `cp`
runs before and after each step, and the ratio is to their mean. Memory is the peak of RssAnon above that after the
imports. Everything is deleted at the end. Exit code 1 if the way there and back changed a tensor.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
SHARD_BYTES = 5 * 10**9

# A step in its own process: samples RssAnon while `{work}` runs, prints seconds and bytes.
STEP = """
import json, os, re, threading, time
from pathlib import Path
{imports}
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
{work}
os.sync()
seconds = time.perf_counter() - begin
done = True
watcher.join()
print(json.dumps([seconds, peak - start]))
"""
CONVERT = "from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint, plan_import\n"
CONVERT += "from megatron_vlbridge.checkpoint.engine import Options"
TRANSFORMERS = "import torch\nfrom transformers import AutoModelForImageTextToText as Auto"


def make_checkpoint(folder: Path, name: str, layers: int | None) -> int:
    """Random bfloat16 weights as the Hub has them; gives their bytes."""
    import torch
    from safetensors.torch import save_file

    from megatron_vlbridge.checkpoint.safetensors import INDEX, plan_shards
    from megatron_vlbridge.config import read_config
    from megatron_vlbridge.families import find
    from megatron_vlbridge.weights import TensorSpec

    values = json.loads((CONFIGS / f"{name}.json").read_text())
    if layers is not None:
        values["text_config"]["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    config = read_config(folder)
    shapes = find(config).table(config).hf_shapes
    specs = {key: TensorSpec(shape, torch.bfloat16) for key, shape in shapes.items()}
    files = plan_shards(specs, SHARD_BYTES)
    random = torch.Generator().manual_seed(0)
    for file in dict.fromkeys(files.values()):
        tensors = {
            key: torch.empty(specs[key].shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=random)
            for key, place in files.items()
            if place == file
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(set(files.values())) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(spec.nbytes for spec in specs.values())


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that each step reads them from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> float:
    forget(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def step(source: Path, imports: str, work: str) -> tuple[float, int]:
    """Seconds and bytes of one piece of work that reads `source`."""
    forget(source)
    command = [sys.executable, "-c", STEP.format(imports=imports, work=work)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(out.splitlines()[-1])
    return seconds, peak


def show(what: str, seconds: float, copies: tuple[float, float], nbytes: int, peak: int) -> None:
    reference = sum(copies) / 2
    print(f"{what:<28} {seconds:7.1f} s {nbytes / seconds / 1e6:7.0f} MB/s", end="   ")
    print(f"cp + sync {copies[0]:6.1f} {copies[1]:6.1f} s   ratio {seconds / reference:5.2f}", end="   ")
    print(f"peak {peak / 2**20:7.0f} MiB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(path.stem for path in CONFIGS.glob("*.json")))
    parser.add_argument("--folder", help="where to work; needs three times the size of the checkpoint")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--memory", type=int, default=2**30, help="bytes")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="benchmark-convert-", dir=args.folder))
    try:
        return measure(args, work)
    finally:
        shutil.rmtree(work)


def measure(args: argparse.Namespace, work: Path) -> int:
    source, megatron, back, spare = (work / name for name in ("hf", "megatron", "back", "spare"))
    nbytes = make_checkpoint(source, args.name, args.layers)
    print(f"{args.name}: {nbytes / 1e9:.2f} GB, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores", end=", ")
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    options = f"options=Options(workers={args.workers}, memory={args.memory})"
    plan_seconds, plan_peak = step(source, CONVERT, f"plan_import({str(source)!r}, {str(spare)!r})")
    print(f"{'plan from headers':<28} {plan_seconds:7.2f} s {'':66} peak {plan_peak / 2**20:7.0f} MiB", flush=True)
    before = copy(source, spare)
    seconds, peak = step(source, CONVERT, f"import_checkpoint({str(source)!r}, {str(megatron)!r}, {options})")
    between = copy(source, spare)
    show("import", seconds, (before, between), nbytes, peak)
    seconds, peak = step(megatron, CONVERT, f"export_checkpoint({str(megatron)!r}, {str(back)!r}, {options})")
    same = all(files_are_equal(path, back / path.name) for path in source.glob("*.safetensors"))
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    after = copy(source, spare)
    show("export", seconds, (between, after), nbytes, peak)
    print("there and back: " + ("identical files" if same else "DIFFERENT"), flush=True)
    if not args.no_transformers:
        load = f"Auto.from_pretrained({str(source)!r}, dtype=torch.bfloat16).save_pretrained({str(spare)!r})"
        seconds, peak = step(source, TRANSFORMERS, load)
        shutil.rmtree(spare)
        show("transformers, load and save", seconds, (after, copy(source, spare)), nbytes, peak)
    return 0 if same else 1


def files_are_equal(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "--silent", a, b], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
