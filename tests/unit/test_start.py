"""A run says which weights it starts from, and a resumed one continues its schedule."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.data.packing.offline import PackingOptions
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.packing import packing_options
from megatron_vlbridge.training.launch.parser import make_parser
from megatron_vlbridge.training.launch.start import (
    check_backend,
    check_schedule,
    check_source,
    loading_errors,
    megatron_errors,
)
from tests import reference
from tests.errors import rejects

PARSER = make_parser(add_arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_checkpoint(folder, tmp_path_factory.mktemp("megatron") / "imported")


def parsed(folder: Path, *words: object) -> argparse.Namespace:
    return PARSER.parse_args(["--hf-folder", str(folder), *map(str, words)])


def refusal(folder: Path, *words: object) -> str:
    with pytest.raises(VLBridgeError) as error:
        check_source(parsed(folder, *words))
    return str(error.value)


NOTHING = "do not say which weights to start from: add --hf-weights"


def test_nothing_is_no_source(folder):
    assert refusal(folder).startswith("the arguments " + NOTHING)
    assert NOTHING in refusal(folder, "--save", "out", "--finetune")


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_checkpoint_is_no_source(folder, imported, tmp_path, exists):
    """It is where a run that is to be resumed saves: its first start needs a source, and starts from that."""
    load = tmp_path / "saved"
    if exists:
        load.mkdir()
    answer = refusal(folder, "--load", load, "--save", load)
    assert f"--load {load}: expected a Megatron checkpoint" in answer
    assert NOTHING in answer
    for source in (["--hf-weights"], ["--random-weights"], ["--pretrained-checkpoint", imported]):
        check_source(parsed(folder, *source, "--load", load, "--save", load))
    for source in ("--hf-weights", "--random-weights"):
        for asked in (["--exit-on-missing-checkpoint"], ["--ckpt-step", 5]):
            assert f"which {asked[0]} asks for" in refusal(folder, source, "--load", load, *asked)


def test_sources(folder, imported):
    for words in (["--load", imported], ["--pretrained-checkpoint", imported], ["--hf-weights"], ["--random-weights"]):
        check_source(parsed(folder, *words))
    # A resumed run keeps the arguments of its first start.
    for words in (["--pretrained-checkpoint", "gone"], ["--hf-weights"], ["--random-weights"]):
        check_source(parsed(folder, *words, "--load", imported))


def test_two_sources_are_refused(folder, imported):
    sources = (["--hf-weights"], ["--random-weights"], ["--pretrained-checkpoint", imported])
    for one in sources:
        for other in sources:
            for load in ([], ["--load", imported]):
                if one != other:
                    assert "weights come from one source" in refusal(folder, *one, *other, *load)


def test_a_pretrained_folder_without_a_checkpoint_is_refused(folder, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere", folder):
        answer = refusal(folder, "--pretrained-checkpoint", wrong)
        assert f"--pretrained-checkpoint {wrong}: expected a Megatron checkpoint" in answer


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_checkpoint_whose_files_are_gone_is_refused(folder, tmp_path, flag):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    (tmp_path / "iter_0000005").mkdir()
    for text, stated in (("7", "iter_0000007: no such folder"), ("release", "release: no such folder"), ("x7", "'x7'")):
        tracker.write_text(text)
        assert stated in refusal(folder, flag, tmp_path)
    tracker.write_text("5")
    assert "neither metadata.json nor mp_rank_*" in refusal(folder, flag, tmp_path)
    answer = refusal(folder, flag, tmp_path, "--ckpt-step", 3)
    assert "iter_0000003: no such folder; it is named by --ckpt-step 3" in answer
    assert "['iter_0000005']" in answer


def test_weights_of_another_model_are_refused(folder, imported, tmp_path):
    other = reference.write_checkpoint(tmp_path / "other", layers=3)
    stated = "decoder.layers.self_attention.linear_qkv.weight: expected [3, 128, 64], found [4, 128, 64]"
    assert stated in refusal(other, "--pretrained-checkpoint", imported)
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "model.language_model.layers.3.mlp.up_proj.weight: expected [96, 64]" in refusal(other, "--hf-weights")


def test_damaged_weights_are_found_in_their_headers(tmp_path):
    copy = reference.write_checkpoint(tmp_path)
    lost = next(copy.glob("*.safetensors"))
    lost.unlink()
    assert lost.name in refusal(copy, "--hf-weights")
    check_source(parsed(copy, "--random-weights"))


SCHEDULE = {
    "init_lr": 0.0,
    "max_lr": 1e-3,
    "min_lr": 1e-5,
    "lr_warmup_steps": 2,
    "lr_decay_steps": 20,
    "lr_decay_style": "cosine",
    "start_wd": 0.01,
    "end_wd": 0.02,
    "wd_incr_steps": 20,
    "wd_incr_style": "linear",
}
OTHER = {
    "max_lr": 2e-3,
    "min_lr": 0.0,
    "lr_warmup_steps": 3,
    "lr_decay_steps": 40,
    "lr_decay_style": "linear",
    "start_wd": 0.0,
    "end_wd": 0.03,
    "wd_incr_steps": 40,
    "wd_incr_style": "cosine",
    "num_steps": 4,
}


def scheduler(**fields: Any) -> OptimizerParamScheduler:
    optimizer: Any = SimpleNamespace(param_groups=[])
    return OptimizerParamScheduler(
        optimizer, **(SCHEDULE | fields), use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=False
    )


def test_the_schedule_is_refused_where_megatron_would_not_load_it():
    given = scheduler().state_dict()
    assert given.keys() == OTHER.keys(), "Megatron saves something that this test does not change"
    check_schedule(given, given, "saved")
    for name, value in OTHER.items():
        saved = given | {name: value}
        try:
            scheduler().load_state_dict(saved)
        except AssertionError:
            with pytest.raises(VLBridgeError, match=f"saved {value}, given {given[name]}\n"):
                check_schedule(saved, given, "saved")
        else:
            assert name == "num_steps"
            check_schedule(saved, given, "saved")


def test_all_values_of_the_schedule_that_differ_are_named():
    given = scheduler().state_dict()
    with pytest.raises(VLBridgeError) as error:
        check_schedule(given | OTHER, given, "out/iter_0000005")
    text = str(error.value)
    assert text.startswith("out/iter_0000005 was trained with another schedule")
    assert text.count(": saved ") == len(OTHER) - 1
    assert "--override-opt_param-scheduler" in text


@pytest.mark.parametrize(
    ("raised", "stated"),
    [
        (AssertionError("heads\n  are odd"), "Megatron rejects these arguments: heads are odd"),
        (ValueError("no"), "Megatron rejects these arguments: no"),
        (SystemExit(0), "it printed its reason"),
        (VLBridgeError("ours"), "ours"),
    ],
)
def test_what_megatron_raises_is_handed_on_in_words(raised, stated):
    with pytest.raises(VLBridgeError, match=stated), megatron_errors():
        raise raised


def load_checkpoint() -> None:
    """Fails as Megatron's function of this name."""
    try:
        raise KeyError("rng_state")
    except KeyError:
        sys.exit()


def test_a_checkpoint_that_megatron_cannot_load_does_not_end_the_run_with_zero():
    with (
        pytest.raises(VLBridgeError, match=r"could not load the checkpoint.*KeyError\('rng_state'\)"),
        loading_errors(),
    ):
        load_checkpoint()
    # Such as --exit-interval.
    with pytest.raises(SystemExit), loading_errors():
        sys.exit()


def test_an_assertion_without_a_message_is_shown_itself():
    stated = r"assert self.lr_warmup_steps < self.lr_decay_steps \(optimizer_param_scheduler.py, line \d+\)"
    with pytest.raises(VLBridgeError, match=stated), megatron_errors():
        scheduler(lr_warmup_steps=20)


@pytest.mark.parametrize(("saved", "given"), [(True, False), (False, True), (True, True)])
def test_the_distributed_optimizer_is_continued_only_by_gpus_from_gpus(folder, saved, given):
    words = ["--cpu"] * given
    sharded = parsed(folder, *words, "--use-distributed-optimizer")
    with pytest.raises(VLBridgeError, match=r"iter_3 was saved on .*--no-load-optim"):
        check_backend(sharded, argparse.Namespace(cpu=saved), "iter_3")
    check_backend(parsed(folder, *words), argparse.Namespace(cpu=saved), "iter_3")
    gpus = parsed(folder, "--use-distributed-optimizer")
    check_backend(gpus, argparse.Namespace(cpu=False), "iter_3")
    # Another script's arguments: it ran on GPUs.
    check_backend(gpus, None, "iter_3")


def test_packing_arguments_become_the_options_of_the_dataset() -> None:
    def options(*words: str) -> PackingOptions:
        return packing_options(PARSER.parse_args(words))

    assert options() == PackingOptions()
    words = "--packing first-fit-decreasing --max-patches-per-pack 7 --pack-window 8 --pack-neighbors 9"
    assert options(*words.split(), "--long-conversations", "drop") == PackingOptions(
        "first-fit-decreasing", 7, 8, 9, "drop"
    )
    for flag in ("--max-patches-per-pack", "--pack-window", "--pack-neighbors"):
        with rejects(f"{flag}: needs --packing first-fit-decreasing"):
            options(flag, "2")
