"""A custom pretrain script: datasets are built before the model, and all ranks raise the same error."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.csv_file import read_rows
from tests import reference
from tests.functional.launch import run_script
from tests.functional.pool import Layout, Pool
from tests.functional.test_arguments import COMPLETE, ROOT

# The first block of Python in this section is a whole script.
PAGE, SECTION = ROOT / "docs" / "training.md", "## In your own pretrain script"
RECORDED = {"def my_datasets(": "datasets", "def my_model(": "model", "    def __getitem__(self, index)": "pack"}


def documented_script() -> str:
    """The script in docs/training.md, with a print in each function."""
    lines = PAGE.read_text().split(SECTION)[1].split("```python\n")[1].split("```")[0].splitlines()
    for start, name in RECORDED.items():
        (index,) = (index for index, line in enumerate(lines) if line.startswith(start))
        indent = " " * (len(start) - len(start.lstrip()) + 4)
        lines.insert(index + 1, f'{indent}print("called: {name}", flush=True)')
    return "\n".join(lines)


def test_the_documented_script_trains_and_evaluates_on_the_cpu(tmp_path: Path) -> None:
    """Without --conversations and --eval-interval; the datasets are built once, before the model."""
    reference.write_checkpoint(tmp_path / "hf")
    (tmp_path / "script.py").write_text(documented_script())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "script.py"]
    command += [*COMPLETE, "--cpu", "--hf-folder", "hf", "--random-weights", "--eval-iters", "3", "--save", "saved"]
    command += ["--log-interval", "1", "--num-workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    called = re.findall("called: (.*)", run.stdout)
    assert called[:2] == ["datasets", "model"]
    # 4 iterations of 2 packs; one evaluation of 3 x 2 packs, after the last iteration.
    assert called[2:] == ["pack"] * (4 * 2 + 3 * 2)
    losses = [float(loss) for loss in re.findall(r"(?:lm loss:|  loss) ([0-9.E+-]+)", run.stdout)]
    assert losses[3] < losses[0]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "4"


@pytest.mark.layouts
def test_positions_are_compared_in_a_model_of_another_provider(tmp_path: Path) -> None:
    reference.write_checkpoint(tmp_path / "hf")
    last = '"videos_per_segment": torch.tensor([0]),'
    text = documented_script()
    assert last in text
    given = f'{last} "position_ids": torch.zeros(3, args.seq_length, dtype=torch.int64),'
    (tmp_path / "script.py").write_text(text.replace(last, given))
    arguments = (*COMPLETE, "--cpu", "--hf-folder", "hf", "--random-weights", "--num-workers", 0)
    assert run_script(tmp_path / "script.py", tmp_path, *arguments)[0] == [0]
    exit_codes, _, errors = run_script(tmp_path / "script.py", tmp_path, *arguments, "--check-position-ids")
    assert exit_codes == [1]
    assert "position_ids" in errors.splitlines()[-1]


@pytest.mark.layouts
def test_a_model_in_a_wrapper_is_measured_and_frozen_as_without(tmp_path: Path) -> None:
    reference.write_checkpoint(tmp_path / "hf")
    text = documented_script()
    wrapper = """class Wrapper(MegatronModule):
    def __init__(self, module):
        super().__init__(module.config)
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def set_input_tensor(self, tensor):
        self.module.set_input_tensor(tensor)


def my_model("""
    wrapped = text.replace("def my_model(", wrapper).replace("    return model\n", "    return Wrapper(model)\n")
    imported = "import torch\n\nfrom megatron.core.transformer.module import MegatronModule\n"
    (tmp_path / "plain.py").write_text(text)
    (tmp_path / "wrapped.py").write_text(wrapped.replace("import torch\n", imported, 1))
    arguments = (*COMPLETE, "--cpu", "--hf-folder", "hf", "--random-weights", "--num-workers", 0, "--log-interval", 1)
    rows = {}
    for name in ("plain", "wrapped"):
        measured = ("--metrics-csv", f"{name}.csv", "--freeze", "merger")
        exit_codes, _, errors = run_script(tmp_path / f"{name}.py", tmp_path, *arguments, *measured)
        assert exit_codes == [0], errors[-3000:]
        rows[name] = read_rows(tmp_path / f"{name}.csv")
    assert len(rows["plain"]) == 4
    for one, other in zip(rows["plain"], rows["wrapped"], strict=True):
        timed = {column for column in one if column in ("seconds", "tokens_per_second", "model_tflops_per_rank")}
        assert {c: x for c, x in one.items() if c not in timed} == {c: x for c, x in other.items() if c not in timed}


def provider(kind: str, rank: int, calls: list[Any]) -> Callable[..., Any]:
    """A dataset provider with one kind of mistake."""

    def datasets(counts: Sequence[int], vp_stage: int | None = None) -> Any:
        calls.append(vp_stage)
        train, validation = list(range(counts[0])), list(range(counts[1]))
        if kind == "rejects" or (kind == "rejects on the second rank" and rank == 1):
            raise VLBridgeError(f"train.jsonl, line 7, on rank {rank}")
        if kind == "slow":
            time.sleep(3)
        if kind == "crashes":
            raise KeyError("line 8")
        return {
            "no training data": (None, validation, None),
            "too short": (train[1:], validation, None),
            "a short validation": (train, validation[1:], None),
            "two datasets": (train, validation),
            "test alone": (train, None, validation),
            "no validation": (train, None, None),
        }.get(kind, (train, validation, None))

    def without_stage(counts: Sequence[int]) -> Any:
        return datasets(counts)

    chosen = without_stage if kind == "without vp_stage" else datasets
    if kind == "rejects on the second rank":
        chosen.is_distributed = True  # type: ignore[attr-defined]
    return chosen


@contextmanager
def parsed(layout: Layout, words: Sequence[object]) -> Iterator[Any]:
    """Megatron's global arguments on this rank."""
    import torch.distributed as dist
    from megatron.training import get_args
    from megatron.training.global_vars import unset_global_variables

    from megatron_vlbridge.training.pretrain import parse_arguments

    saved, environment, sys.argv = sys.argv, dict(os.environ), ["x", *map(str, words), "--random-weights"]
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(layout.world))
    try:
        parse_arguments()
        yield get_args()
    finally:
        sys.argv = saved
        os.environ.clear()
        os.environ.update(environment)
        unset_global_variables()


def build_datasets(layout: Layout, folder: Path, kinds: Sequence[str]) -> list[Any]:
    """For each kind the error of `build`; or `eval_iters`, the calls, and the sizes of the datasets for Megatron."""
    import torch.distributed as dist

    from megatron_vlbridge.training.datasets import EagerDatasetProvider

    found: list[Any] = []
    sizes = ["--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp]
    sizes += ["--num-virtual-stages-per-pipeline-rank", layout.vpp] if layout.vpp > 1 else []
    with parsed(layout, [*COMPLETE, "--hf-folder", folder, *sizes, "--eval-iters", 3]) as args:
        for kind in kinds:
            args.eval_iters, calls = 3, []
            datasets = EagerDatasetProvider(provider(kind, dist.get_rank(), calls))
            try:
                datasets.build()
            except VLBridgeError as error:
                found.append(str(error))
                continue
            stages = list(range(layout.vpp)) if layout.vpp > 1 else [None]
            given = [datasets([8, 6, 6], vp_stage=stage)[0] for stage in stages] if calls else []
            found.append((args.eval_iters, calls, [len(train) for train in given]))
    return found


def build_slowly(layout: Layout, folder: Path) -> list[Any]:
    """The same for a slow provider and one that fails, where collectives time out sooner than they are ready."""
    import torch.distributed as dist

    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    backend._set_default_timeout(timedelta(seconds=1))
    try:
        return build_datasets(layout, folder, ["slow", "rejects"])
    finally:
        backend._set_default_timeout(timedelta(minutes=5))


def count_samples(layout: Layout, folder: Path, words: Sequence[object]) -> tuple[list[Any], Any, list[Any]]:
    """The sample counts passed to the provider, `train_iters` afterwards, and the counts that Megatron computes."""
    from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

    from megatron_vlbridge.training.datasets import EagerDatasetProvider

    requested: list[Any] = []

    def datasets(counts: Sequence[int]) -> Any:
        requested.extend(counts)
        return tuple(range(counts[0])), tuple(range(counts[1])), None

    others = ["--seq-length", 64, "--lr", 1, "--global-batch-size", 2]
    with parsed(layout, ["--hf-folder", folder, *others, *words]) as args:
        EagerDatasetProvider(datasets).build()
        iterations = args.train_iters
        update_train_iters(args)
        return requested, iterations, list(get_train_valid_test_num_samples())


@pytest.mark.parametrize(
    ("words", "expected", "iterations"),
    [
        (["--train-iters", 4, "--eval-iters", 3], [8, 6, 6], 4),
        (["--train-iters", 4, "--eval-iters", 3, "--eval-interval", 2], [8, 18, 6], 4),
        (["--train-samples", 9, "--eval-iters", 3], [9, 6, 6], None),
    ],
)
def test_the_provider_gets_the_sample_counts_of_megatron(
    pool: Pool, tmp_path: Path, words: list[object], expected: list[int], iterations: int | None
) -> None:
    folder = reference.write_checkpoint(tmp_path)
    found = pool.run(count_samples, Layout(), folder=folder, words=words)[0]
    assert found == (expected, iterations, expected)


REJECTED = {
    "rejects": "train.jsonl, line 7, on rank 0",
    "rejects on the second rank": "train.jsonl, line 7, on rank 1",
    "crashes": "the dataset provider failed with KeyError: 'line 8'",
    "two datasets": "failed with ValueError: not enough values to unpack",
    "no training data": "returned no training dataset",
    "too short": "the training dataset has 7 packs, expected at least 8",
    "a short validation": "the validation dataset has 5 packs, expected at least 6",
    "test alone": "a test dataset without a validation dataset",
}


def test_all_ranks_reject_the_data_with_the_same_message(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    kinds = [*REJECTED, "fits", "no validation"]
    first, second = pool.run(build_datasets, Layout(tp=2, world=2), folder=folder, kinds=kinds)
    for kind, one, other in zip(REJECTED, first, second, strict=False):
        assert REJECTED[kind] in one
        assert one == other
    assert first[-2:] == [(3, [None], [8]), (0, [None], [8])]
    # Only the first rank of a tensor-parallel group builds datasets; all ranks know whether to evaluate.
    assert second[-2:] == [(3, [], []), (0, [], [])]


def test_ranks_wait_for_data_longer_than_collectives_do(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    first, second = pool.run(build_slowly, Layout(tp=2, world=2), folder=folder)
    assert (first[0], second[0]) == ((3, [None], [8]), (3, [], []))
    assert first[1] == second[1] == REJECTED["rejects"]


def test_each_virtual_stage_gets_its_datasets(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    layout = Layout(pp=2, vpp=2, world=2)
    for found in pool.run(build_datasets, layout, folder=folder, kinds=["fits", "without vp_stage"]):
        assert found[0] == (3, [0, 1], [8, 8])
        assert "an argument vp_stage" in found[1]


def first_step(layout: Layout, folder: Path) -> str:
    """The error of `vlm_step` for a model of another provider with a setting that is not verified."""
    from megatron_vlbridge.training.step import vlm_step
    from tests.functional.ranks import build_model

    model = build_model(layout, folder, load=False)
    model.config.qk_l2_norm = True
    with pytest.raises(VLBridgeError) as rejection:
        vlm_step(iter([]), model)
    model.config.qk_l2_norm = False
    with pytest.raises(StopIteration):
        vlm_step(iter([]), model)
    return str(rejection.value)


def test_a_model_of_another_provider_is_checked_at_the_first_step(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    assert "qk_l2_norm=True" in pool.run(first_step, Layout(), folder=folder)[0]


def test_a_script_without_a_launcher_is_rejected() -> None:
    code = "from megatron_vlbridge.backends import cpu_runtime; cpu_runtime.enable()\n"
    code += "from megatron_vlbridge.training.pretrain import run; run(None, None)"
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MASTER_ADDR is not set" in done.stderr
    assert "torchrun --nproc_per_node 1" in done.stderr
