"""The example with adapters: all layouts have the curve of one process, a resumed run continues, the export fits."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.peft.export import export_adapter
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.cli import main
from tests import digits_checkpoint
from tests.cases import later
from tests.closeness import assert_close_in_norm, relative_error
from tests.functional.pool import Pool
from tests.functional.test_arguments import said
from tests.functional.test_docs import COMMANDS, command
from tests.functional.test_training import train

ITERATIONS = 20
LORA = ("--lora-rank", 4, "--lora-alpha", 16)
BASE = ("--hf-folder", "hf", "--hf-weights")
SAVE = ("--save-interval", ITERATIONS, "--train-iters", ITERATIONS)
TP2_PP2_CP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--pipeline-model-parallel-size", 2)
TP2_PP2_CP2 += ("--context-parallel-size", 2)
EP2 = ("--expert-model-parallel-size", 2)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_checkpoint.write(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> SimpleNamespace:
    """The losses of a run that nothing interrupts, and its adapters."""
    losses = train(folder, *BASE, *LORA, "--lora-vision", "--save", "straight", *SAVE)
    assert losses[-1] < losses[0]
    return SimpleNamespace(losses=losses, adapters=exported(folder, "straight"))


def exported(folder: Path, run: str) -> dict[str, torch.Tensor]:
    made = export_adapter(folder / run, folder / f"{run}-peft", folder / "hf")
    assert all(name.startswith("adapter/") for name in TorchDistFolder(folder / run).table)
    return load_file(made / WEIGHTS)


def assert_same_adapters(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert x.any(), name
        assert relative_error(found[name], x) <= bound, name


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        later(2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
        later(2, ("--tensor-model-parallel-size", 2)),
        later(2, ("--pipeline-model-parallel-size", 2)),
        later(2, ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)),
        later(2, ("--context-parallel-size", 2, "--overlap-grad-reduce")),
        later(8, TP2_PP2_CP2),
        later(2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
        later(1, ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1)),
    ],
    ids=["tp2-sp", "tp2", "pp2", "vpp2", "cp2", "tp2-sp-pp2-cp2", "dp2", "recomputed"],
)
def test_a_layout_has_the_loss_curve_of_one_process(
    folder: Path, straight: SimpleNamespace, processes: int, layout: tuple[object, ...]
) -> None:
    name = "-".join(map(str, layout)).replace("--", "")
    found = train(folder, *BASE, *LORA, "--lora-vision", "--save", name, *SAVE, *layout, processes=processes)
    assert_close_in_norm(found, straight.losses)
    assert_same_adapters(exported(folder, name), straight.adapters, 1e-2)


@pytest.mark.layouts
def test_experts_in_a_layout_have_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    folder = digits_checkpoint.write(tmp_path, experts=True)
    options = (*BASE, *LORA, "--moe-token-dispatcher-type", "alltoall", *SAVE)
    losses = train(folder, *options, "--save", "straight")
    found = train(folder, *options, "--save", "ep2", *EP2, processes=2)
    assert_close_in_norm(found, losses)
    assert_same_adapters(exported(folder, "ep2"), exported(folder, "straight"), 1e-2)


def test_a_resumed_run_continues_on_an_imported_base(
    folder: Path, straight: SimpleNamespace, tmp_path: Path, pool: Pool
) -> None:
    imported = import_checkpoint(folder / "hf", tmp_path / "imported")
    arguments = ("--hf-folder", imported / "hf", "--pretrained-checkpoint", imported, *LORA, "--lora-vision")
    arguments += ("--save", "resumed", "--load", "resumed", "--save-interval", 5, *SAVE[2:])
    first = train(folder, *arguments, "--exit-interval", 5)
    assert len(first) == 5
    other_adapters_are_rejected(folder, imported, pool)
    layout = ("--tensor-model-parallel-size", 2)
    assert_close_in_norm(first + train(folder, *arguments, *layout, processes=2), straight.losses)
    assert_same_adapters(exported(folder, "resumed"), straight.adapters, 1e-2)


def other_adapters_are_rejected(folder: Path, imported: Path, pool: Pool) -> None:
    load = ("--hf-folder", imported / "hf", "--load", folder / "resumed", "--lr-decay-style", "constant")
    load += ("--train-iters", ITERATIONS)
    base = ("--pretrained-checkpoint", imported)
    assert said(pool, *load, *base, *LORA, "--lora-vision") == "accepted"
    assert "it holds adapters alone" in said(pool, *load, *LORA, "--lora-vision")
    assert "expected the weights of a model, found adapters of rank 4" in said(pool, *load)
    assert "--lora-rank 4, and this run has 8" in said(pool, *load, *base, "--lora-rank", 8, "--lora-alpha", 16)
    assert "--lora-alpha 16.0, and this run has 4" in said(pool, *load, *base, "--lora-rank", 4, "--lora-alpha", 4)
    text = said(pool, *load, *base, *LORA)
    assert "adapters of 42 weights, and this run of 28; model." in text
    assert "has one only there. Give the --lora-targets of that run" in text
    answer = said(pool, "--hf-folder", imported / "hf", "--load", imported, *base, *LORA)
    assert "expected adapters (--lora-rank), found none" in answer


def test_the_commands_export_and_merge_the_adapters(
    folder: Path,
    straight: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = str(folder / "straight")
    (tmp_path / "run-lora").symlink_to(run)
    (tmp_path / "Qwen3-VL-8B-Instruct").symlink_to(folder / "hf")
    monkeypatch.chdir(tmp_path)
    assert main(command(COMMANDS["lora export"])[1:]) == 0
    assert_same_adapters(load_file(tmp_path / "adapter" / WEIGHTS), straight.adapters, 0.0)
    assert main(command(COMMANDS["lora merge"])[1:]) == 0
    base, merged = (load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "merged"))
    for name, x in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        halves = [straight.adapters.get(f"{prefix}{half}.weight") for half in "AB"]
        assert torch.equal(merged[name], x if halves[0] is None else x + halves[1] @ halves[0] * 4), name
    assert main(["export", run, str(tmp_path / "other"), "--adapter", "--dtype", "bf16"]) == 2
    assert "--dtype: expected none with --adapter" in capsys.readouterr().err
    assert main(["export", str(folder / "hf"), str(tmp_path / "other"), "--adapter"]) == 1
    capsys.readouterr()
    assert main(["export", run, str(tmp_path / "other")]) == 1
    assert "found adapters (a run with --lora-rank). Export them with --adapter" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        (["--lora-alpha", 8], "--lora-alpha: expected --lora-rank too"),
        (["--lora-vision"], "--lora-vision: expected --lora-rank too"),
        (["--lora-rank", 8], "expected --lora-alpha too, found none. Add it, such as --lora-alpha 16"),
        ([*LORA, "--freeze", "vision"], "--freeze: expected none with --lora-rank"),
        ([*LORA, "--random-weights"], "--random-weights: expected none with --lora-rank"),
        ([*LORA, "--lora-dropout", 1.0], "LoRA dropout: expected 0 to below 1, found 1.0"),
        ([*LORA, "--lora-targets", "gate"], "LoRA target 'gate': expected a projection of the decoder layers"),
        ([*LORA, "--lora-targets", "q_norm"], "expected only projections, found model.language_model.layers.0"),
        ([*LORA, "--lora-targets", "q_proj", "(", "--hf-weights"], "a name or a regular expression, found"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_rejected(
    folder: Path, pool: Pool, arguments: list[object], stated: str
) -> None:
    assert stated in said(pool, "--hf-folder", folder / "hf", *arguments)
