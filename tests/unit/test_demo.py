import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_vlbridge.data.dataset import read_conversations
from megatron_vlbridge.demo import __main__ as command
from megatron_vlbridge.demo.answers import Answers, accuracy
from megatron_vlbridge.demo.digits import (
    conversations,
    load_conversations,
    load_scans,
    video_conversations,
    write_conversations,
)
from megatron_vlbridge.demo.output import Folder, Progress
from megatron_vlbridge.demo.process import (
    Follower,
    Recipe,
    Training,
    adapter_training,
    arguments,
    base_training,
    follow,
    loss_of,
)
from megatron_vlbridge.demo.report import Base, Difference, Result, report_text
from megatron_vlbridge.demo.start import FAMILIES
from megatron_vlbridge.errors import VLBridgeError
from tests.unit.time_limit import limit

# A line of the training's log.
LINE = "iteration {:2}/20  loss {}  grad norm 0.921  5,386 tokens/s  1 min 15 s left\n"
RECIPE = Recipe(tp=1, pp=1, iterations=20, seed=0)
GOOD = Result(
    model="Qwen3-VL",
    recipe=RECIPE,
    parameters=1_080_064,
    train_conversations=3000,
    held_out_conversations=357,
    losses=[6.2, 0.001],
    accuracy_megatron=0.96,
    accuracy_transformers=0.96,
    blind_megatron=0.1,
    blind_transformers=0.1,
    accuracy_videos=0.937,
    other_answers=0,
    logits=Difference(2e-5, 1e-7),
    seconds={"Import": 0.5},
)

BASE = Base(conversations=1500, adapter_parameters=210_944, accuracy=0.43, accuracy_known=0.97, accuracy_others=0.0)
WITH_ADAPTERS = replace(GOOD, base=BASE, recipe=replace(RECIPE, lora=True))


def test_the_loss_is_read_from_the_line_of_an_iteration() -> None:
    assert loss_of(LINE.format(4, "0.2384000")) == 0.2384
    assert loss_of(LINE.format(20, "nan")) != loss_of(LINE.format(20, "nan"))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "validation loss 1.000000 at iteration 20\n",
        "checkpoint saved at iteration 20: out\n",
    ],
)
def test_other_lines_have_no_loss(line: str) -> None:
    assert loss_of(line) is None


def test_the_follower_collects_losses_and_shows_where_the_training_stands() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    follower = Follower(Progress(stream))
    for line in ("starting\n", LINE.format(1, "6.000000"), "a warning\n", LINE.format(2, "3.000000")):
        follower(line)
    assert follower.losses == [6.0, 3.0]
    assert stream.getvalue().endswith(LINE.format(2, "3.000000").rstrip())


def test_a_stream_that_is_no_terminal_gets_no_moving_line() -> None:
    stream = StringIO()
    progress = Progress(stream)
    with progress.stage("Import"):
        progress.live("moving")
        progress.note("staying")
    assert stream.getvalue() == "[1/8] Import\n      staying\n      0.0 s\n"
    assert list(progress.seconds) == ["Import"]
    with Progress(stream, stages=10).stage("Import"):
        assert stream.getvalue().endswith("[1/10] Import\n")


def values_of(training: Callable[[Folder, Recipe], Training], recipe: Recipe) -> dict[str, str]:
    """Each option of a training with the word after it."""
    return dict(pairwise(arguments(training(Folder(Path("out")), recipe), recipe)))


def test_every_layout_is_one_process_for_each_part_of_the_model() -> None:
    value = values_of(base_training, replace(RECIPE, tp=2, pp=2, iterations=1))
    assert (value["--nproc-per-node"], value["--tensor-model-parallel-size"]) == ("4", "2")
    assert value["--pipeline-model-parallel-size"] == "2"
    assert "--sequence-parallel" in value
    assert int(value["--lr-warmup-iters"]) < int(value["--train-iters"])
    assert "--sequence-parallel" not in values_of(base_training, RECIPE)


def test_adapters_get_two_thirds_of_the_iterations_and_start_from_the_exported_base() -> None:
    recipe = replace(RECIPE, lora=True, tp=2, iterations=450)
    base, adapters = values_of(base_training, recipe), values_of(adapter_training, recipe)
    assert (base["--train-iters"], adapters["--train-iters"]) == ("150", "300")
    assert (base["--save-interval"], adapters["--save-interval"]) == ("150", "300")
    assert (base["--data"], adapters["--data"]) == ("out/data/base.yaml", "out/data/meta.yaml")
    assert "--lora-rank" not in base
    assert "--pretrained-checkpoint" not in adapters
    assert adapters["--hf-folder"] == "out/hf-trained"
    assert base["--save"] != adapters["--save"]
    alone = values_of(base_training, replace(recipe, lora=False))
    assert (alone["--train-iters"], alone["--data"]) == ("450", "out/data/meta.yaml")
    least = replace(recipe, iterations=1)
    assert (least.base_iterations, least.adapter_iterations) == (1, 1)


def test_all_claims_of_a_good_result_hold() -> None:
    assert all(claim.holds for claim in GOOD.claims)
    assert all(claim.holds for claim in WITH_ADAPTERS.claims)
    assert len(WITH_ADAPTERS.claims) == len(GOOD.claims) + 1


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"accuracy_megatron": 0.89, "accuracy_transformers": 0.89}, [0]),
        ({"accuracy_megatron": 0.95}, [1]),
        ({"logits": Difference(6e-4, 1e-7)}, [2]),
        ({"logits": Difference(1e-7, 2e-5)}, [2]),
        ({"logits": Difference(float("nan"), float("nan"))}, [2]),
        ({"logits": Difference(1e-7, float("nan"))}, [2]),
        ({"blind_megatron": 0.21}, [3]),
        ({"blind_transformers": 0.21}, [3]),
    ],
)
def test_a_claim_fails_alone(change: dict[str, object], failed: list[int]) -> None:
    claims = replace(GOOD, **change).claims  # type: ignore[arg-type]
    assert [number for number, claim in enumerate(claims) if not claim.holds] == failed


@pytest.mark.parametrize(
    "change", [{"accuracy_known": 0.89}, {"accuracy_others": 0.11}, {"accuracy_others": float("nan")}]
)
def test_a_base_that_knows_too_little_or_too_much_fails_its_claim(change: dict[str, float]) -> None:
    claims = replace(WITH_ADAPTERS, base=replace(BASE, **change)).claims
    assert [number for number, claim in enumerate(claims) if not claim.holds] == [4]


def test_the_report_tells_figures_layout_and_what_failed() -> None:
    text = report_text(replace(GOOD, recipe=replace(RECIPE, tp=2, pp=2), blind_megatron=0.5))
    for part in (
        "96.00%",
        "93.70%",
        "1,080,064",
        "TP=2 x PP=2",
        "| Import | 0.5 s |",
        "(loss.png)",
        "(answers.png)",
        "megatron-core",
    ):
        assert part in text
    assert text.count("**no**") == 1
    assert "**no**" not in report_text(GOOD)
    assert "adapter" not in report_text(GOOD)


def test_the_report_of_adapters_tells_what_the_base_answered() -> None:
    text = report_text(WITH_ADAPTERS)
    for part in (
        "97.0% and 0.0%",
        "43.00%",
        "zero to four",
        "1,500",
        "210,944",
        "19.5%",
        "rank 16",
        "`adapter/`",
        "`hf-merged/`",
    ):
        assert part in text


def test_a_difference_is_the_largest_and_the_norms_quotient() -> None:
    difference = Difference.of(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))
    assert (difference.absolute, difference.relative) == (0.5, 0.1)
    with pytest.raises(VLBridgeError, match=r"expected \[2, 1\], found \[1, 2\]"):
        Difference.of(torch.zeros(1, 2), torch.zeros(2, 1))


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    for name in ("report.md", "data"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(VLBridgeError, match="--out"):
        Folder(tmp_path).prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report.md"]
    with pytest.raises(VLBridgeError, match="--out"):
        Folder(tmp_path / "data").prepare()


def test_a_former_result_is_replaced_and_what_others_put_there_is_kept(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("mine")
    folder = Folder(tmp_path / "out")
    folder.prepare()
    folder.report.write_text("old")
    folder.data.mkdir()
    (folder.data / "train.jsonl").write_text("old")
    folder.hf_trained.symlink_to(elsewhere)
    (folder.root / "notes.txt").write_text("mine")
    folder.prepare()
    assert sorted(path.name for path in folder.root.iterdir() if not path.name.startswith(".")) == ["logs", "notes.txt"]
    assert list(elsewhere.iterdir()) == [elsewhere / "weights"]


def test_all_that_the_demo_writes_is_replaced(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert set(folder.contents) == {path for path in vars(folder).values() if isinstance(path, Path)} - {folder.root}
    assert len(folder.contents) == 12


def test_conversations_come_back_from_their_files_each_image_written_once(tmp_path: Path) -> None:
    scans = load_scans(32)[:6]
    original = conversations(scans, pairs=4) + video_conversations(scans, 3)
    write_conversations(original, tmp_path / "some.jsonl")
    assert len(list((tmp_path / "some").glob("*.png"))) == 6
    found = load_conversations(tmp_path / "some.jsonl")
    assert len(found) == len(original) == len(read_conversations(tmp_path / "some.jsonl"))
    for one, other in zip(original, found, strict=True):
        assert [message["role"] for message in one] == [message["role"] for message in other]
        for part, part_found in zip(
            one[0]["content"] + one[1]["content"], other[0]["content"] + other[1]["content"], strict=True
        ):
            if part["type"] == "image":
                assert part["image"].tobytes() == part_found["image"].tobytes()
            elif part["type"] == "video":
                assert [x.tobytes() for x in part["video"]] == [x.tobytes() for x in part_found["video"]]
                assert part["fps"] == part_found["fps"]
            else:
                assert part == part_found


def test_answers_come_back_from_their_file(tmp_path: Path) -> None:
    answers = Answers(("seven", 'two "\n'), ("", "ö"), torch.randn(3, 5))
    answers.save(tmp_path / "answers.safetensors")
    found = Answers.load(tmp_path / "answers.safetensors")
    assert (found.texts, found.texts_blind) == (answers.texts, answers.texts_blind)
    assert torch.equal(found.logits, answers.logits)


def test_an_answer_counts_only_word_for_word() -> None:
    asked = conversations(load_scans(32)[7:8], pairs=0) * 4
    assert accuracy(["seven", " seven", "seven seven", "one"], asked) == 0.25


def test_the_output_of_a_process_is_kept_and_followed(tmp_path: Path) -> None:
    lines: list[str] = []
    follow(["-c", "import os; print('a'); os.write(2, b'b\\xff\\n')"], tmp_path / "log", lines.append)
    assert sorted(lines) == ["a\n", "b�\n"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "".join(lines)


REPORTS = {
    "alone": "Error: the reason\nand more",
    "torchrun": "ChildFailedError:\n====\nRoot Cause\n  traceback :\n  Error: the reason\n  and more\n====\n",
}


@pytest.mark.parametrize("report", REPORTS)
def test_a_failing_process_is_told_with_what_it_reported(tmp_path: Path, report: str) -> None:
    code = f"print('begin'); print({REPORTS[report]!r}); exit(3)"
    with pytest.raises(VLBridgeError, match="status 3") as failure:
        follow(["-c", code], tmp_path / "log")
    assert str(failure.value).endswith(f"{tmp_path / 'log'}\nError: the reason\nand more")


def test_a_process_that_fails_without_a_report_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(VLBridgeError, match="status 3") as failure:
        follow(["-c", "[print('line', i) for i in range(20)]; exit(3)"], tmp_path / "log")
    assert "line 19" in str(failure.value)
    assert "line 4\n" not in str(failure.value)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would the tests that run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_ends_the_process_before_it_is_reported(tmp_path: Path, interruptible: None) -> None:
    child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    found: list[int] = []

    def on_line(line: str) -> None:
        found.append(int(line))
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()

    with limit(), pytest.raises(KeyboardInterrupt):
        follow(["-c", child], tmp_path / "log", on_line)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


@pytest.mark.parametrize(
    "wrong",
    [["--tp", "0"], ["--pp", "3"], ["--iterations", "0"], ["--seed", "-1"], ["--iterations", "many"], ["--unknown"]],
)
def test_a_wrong_option_is_usage(wrong: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vlbridge.demo", *wrong], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_every_family_can_be_chosen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names them before it imports what makes them."""
    monkeypatch.setattr("sys.argv", ["demo", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"{{{','.join(FAMILIES)}}}" in capsys.readouterr().out
