"""A pretrain script of one's own: datasets come before the model, and what is refused is refused on all ranks alike."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.functional.pool import Layout, Pool
from tests.functional.test_arguments import COMPLETE, ROOT

# The first block of Python in this section is a whole script.
PAGE, SECTION = ROOT / "docs" / "training.md", "## In your own pretrain script"
RECORDED = {"def my_datasets(": "datasets", "def my_model(": "model", "    def __getitem__(self, index)": "pack"}


def documented_script() -> str:
    """The script of the page, which prints what is called."""
    lines = PAGE.read_text().split(SECTION)[1].split("```python\n")[1].split("```")[0].splitlines()
    for start, name in RECORDED.items():
        (number,) = (number for number, line in enumerate(lines) if line.startswith(start))
        indent = " " * (len(start) - len(start.lstrip()) + 4)
        lines.insert(number + 1, f'{indent}print("called: {name}", flush=True)')
    return "\n".join(lines)


def test_the_documented_script_trains_and_is_evaluated_on_the_cpu(tmp_path: Path) -> None:
    """Without --conversations and --eval-interval; the datasets are asked for once, before the model."""
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


def provider(kind: str, rank: int, calls: list[Any]) -> Callable[..., Any]:
    """Dataset providers of every kind of mistake."""

    def datasets(counts: Sequence[int], vp_stage: int | None = None) -> Any:
        calls.append(vp_stage)
        train, validation = list(range(counts[0])), list(range(counts[1]))
        if kind == "refuses" or (kind == "refuses on the second rank" and rank == 1):
            raise VLBridgeError(f"train.jsonl, line 7, on rank {rank}")
        if kind == "breaks":
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

    chosen = without_stage if kind == "takes no stage" else datasets
    if kind == "refuses on the second rank":
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
    """Of each kind what `build` raises; or evaluations, calls and the sizes of what Megatron gets afterwards."""
    import torch.distributed as dist

    from megatron_vlbridge.training.datasets import DatasetsFirst

    found: list[Any] = []
    sizes = ["--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp]
    sizes += ["--num-virtual-stages-per-pipeline-rank", layout.vpp] if layout.vpp > 1 else []
    with parsed(layout, [*COMPLETE, "--hf-folder", folder, *sizes, "--eval-iters", 3]) as args:
        for kind in kinds:
            args.eval_iters, calls = 3, []
            datasets = DatasetsFirst(provider(kind, dist.get_rank(), calls))
            try:
                datasets.build()
            except VLBridgeError as error:
                found.append(str(error))
                continue
            stages = list(range(layout.vpp)) if layout.vpp > 1 else [None]
            given = [datasets([8, 6, 6], vp_stage=stage)[0] for stage in stages] if calls else []
            found.append((args.eval_iters, calls, [len(train) for train in given]))
    return found


def count_samples(layout: Layout, folder: Path, words: Sequence[object]) -> tuple[list[Any], Any, list[Any]]:
    """What the provider is asked for, the iterations known afterwards, and what Megatron then asks for."""
    from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

    from megatron_vlbridge.training.datasets import DatasetsFirst

    asked: list[Any] = []

    def datasets(counts: Sequence[int]) -> Any:
        asked.extend(counts)
        return tuple(range(counts[0])), tuple(range(counts[1])), None

    others = ["--seq-length", 64, "--lr", 1, "--global-batch-size", 2]
    with parsed(layout, ["--hf-folder", folder, *others, *words]) as args:
        DatasetsFirst(datasets).build()
        known = args.train_iters
        update_train_iters(args)
        return asked, known, list(get_train_valid_test_num_samples())


@pytest.mark.parametrize(
    ("words", "expected", "iterations"),
    [
        (["--train-iters", 4, "--eval-iters", 3], [8, 6, 6], 4),
        (["--train-iters", 4, "--eval-iters", 3, "--eval-interval", 2], [8, 18, 6], 4),
        (["--train-samples", 9, "--eval-iters", 3], [9, 6, 6], None),
    ],
)
def test_the_provider_is_asked_for_what_megatron_would(
    pool: Pool, tmp_path: Path, words: list[object], expected: list[int], iterations: int | None
) -> None:
    folder = reference.write_checkpoint(tmp_path)
    found = pool.run(count_samples, Layout(), folder=folder, words=words)[0]
    assert found == (expected, iterations, expected)


REFUSED = {
    "refuses": "train.jsonl, line 7, on rank 0",
    "refuses on the second rank": "train.jsonl, line 7, on rank 1",
    "breaks": "the dataset provider failed with KeyError: 'line 8'",
    "two datasets": "failed with ValueError: not enough values to unpack",
    "no training data": "gave no training dataset",
    "too short": "the training dataset has 7 packs, expected at least 8",
    "a short validation": "the validation dataset has 5 packs, expected at least 6",
    "test alone": "a test dataset without a validation dataset",
}


def test_all_ranks_refuse_the_data_with_one_text(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    kinds = [*REFUSED, "fits", "no validation"]
    first, second = pool.run(build_datasets, Layout(tp=2, world=2), folder=folder, kinds=kinds)
    for kind, one, other in zip(REFUSED, first, second, strict=False):
        assert REFUSED[kind] in one
        assert one == other
    assert first[-2:] == [(3, [None], [8]), (0, [None], [8])]
    # Only the first rank of a tensor-parallel group builds datasets; all know whether there is an evaluation.
    assert second[-2:] == [(3, [], []), (0, [], [])]


def test_each_virtual_stage_gets_its_datasets(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    layout = Layout(pp=2, vpp=2, world=2)
    for found in pool.run(build_datasets, layout, folder=folder, kinds=["fits", "takes no stage"]):
        assert found[0] == (3, [0, 1], [8, 8])
        assert "an argument vp_stage" in found[1]


def first_step(layout: Layout, folder: Path) -> str:
    """What `vlm_step` says to a model that another provider built with a setting that is not proved."""
    from megatron_vlbridge.training.step import vlm_step
    from tests.functional.ranks import build_model

    model = build_model(layout, folder, load=False)
    model.config.qk_l2_norm = True
    with pytest.raises(VLBridgeError) as refusal:
        vlm_step(iter([]), model)
    model.config.qk_l2_norm = False
    with pytest.raises(StopIteration):
        vlm_step(iter([]), model)
    return str(refusal.value)


def test_a_model_of_another_provider_is_checked_at_the_first_step(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    assert "qk_l2_norm=True, proved: " in pool.run(first_step, Layout(), folder=folder)[0]


def test_a_script_without_a_launcher_is_refused() -> None:
    code = "from megatron_vlbridge.backends import cpu_runtime; cpu_runtime.enable()\n"
    code += "from megatron_vlbridge.training.pretrain import run; run(None, None)"
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "VLBridgeError: the ranks cannot find each other" in done.stderr
    assert "torchrun --nproc_per_node 1" in done.stderr
