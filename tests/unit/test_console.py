import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
from torch._utils import ExceptionWrapper
from transformers import Qwen3VLForConditionalGeneration

from megatron_vlbridge import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.console import ShortLog, argument_warnings, summary
from megatron_vlbridge.training.failure import describe
from megatron_vlbridge.training.launch.start import check_trackers
from megatron_vlbridge.weights.plan import MismatchError
from tests import reference
from tests.errors import rejects
from tests.unit.test_log_lines import EXPERTS

PRINTS = "def print_rank_0(message):\n    print(message)\n\ndef log(message):\n    print_rank_0(message)\n"
SAVED = " successfully saved checkpoint from iteration       1 to out [ t 1/1 ]"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def megatron() -> ModuleType:
    """A module whose name starts with `megatron.`, with functions that print."""
    module = ModuleType("megatron.training.anything")
    exec(PRINTS, module.__dict__)
    return module


def printed(stream: StringIO, action: Callable[[], None]) -> str:
    with redirect_stdout(cast(StringIO, ShortLog(stream, lambda: 256))):
        action()
    return stream.getvalue()


def test_the_output_of_megatron_is_shortened_and_that_of_the_script_is_not(megatron: ModuleType) -> None:
    def action() -> None:
        megatron.log("------------ arguments ------------\n  a ..... 1")
        print("> building my dataset", end=" ")
        print("...")
        megatron.log(EXPERTS)
        megatron.log(SAVED)
        megatron.print_rank_0("a line of the script, through Megatron's function")

    assert printed(StringIO(), action).splitlines() == [
        "> building my dataset ...",
        "iteration 1/6  loss 5.834869  load_balancing_loss 1.021448  grad norm 6.024  4,031 tokens/s",
        "checkpoint saved at iteration 1: out",
        "a line of the script, through Megatron's function",
    ]


def test_a_wrapper_of_stdout_between_megatron_and_the_stream_changes_nothing(megatron: ModuleType) -> None:
    """W&B replaces `sys.stdout.write`."""
    wrapper = ModuleType("wandb.sdk.anything")
    exec("def wrap(write):\n    return lambda text: write(text)\n", wrapper.__dict__)

    def action() -> None:
        sys.stdout.write = wrapper.wrap(sys.stdout.write)  # type: ignore[method-assign]
        megatron.log("------------ arguments ------------")
        print("the script")
        megatron.log(SAVED)

    assert printed(StringIO(), action) == "the script\ncheckpoint saved at iteration 1: out\n"


def test_on_a_terminal_an_iteration_overwrites_the_previous_one(
    megatron: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    second = EXPERTS.replace(" 1/ ", " 2/ ")

    def action() -> None:
        megatron.log(EXPERTS)
        megatron.log(second)
        print(end="")
        print("the script")
        megatron.log(EXPERTS.replace(" 1/ ", " 6/ "))
        megatron.log(SAVED)

    assert printed(Terminal(), action).split("\r\x1b[2K") == [
        "",
        "iteration 1/6  loss 5.834869  load_bala",
        "iteration 2/6  loss 5.834869  load_bala\nthe script\n",
        "iteration 6/6  loss 5.834869  load_bala\n",
        "checkpoint saved at iteration 1: out\n",
    ]


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_does_not_change_stdout_and_warnings(verbose: bool) -> None:
    code = (
        "import sys, warnings\n"
        "from megatron_vlbridge.training import console\n"
        "stdout, filters = sys.stdout, list(warnings.filters)\n"
        "console.start(); console.start()\n"
        "print(sys.stdout is stdout, warnings.filters == filters, sys.excepthook is sys.__excepthook__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(["--verbose"] if verbose else [])], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(verbose), str(verbose), "False"]


def test_warnings_of_megatron_about_the_arguments_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("megatron.training.utils.anything")
    exec("import warnings\ndef warn(text): warnings.warn(text)", module.__dict__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="megatron")
        with argument_warnings():
            module.warn("Disabling --async-save.")
        module.warn("an import warning")
    assert capsys.readouterr().out == "warning  Disabling --async-save.\n"


REJECTING = """
import os, sys
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.failure import report_failures
report_failures()
print("before")
if "full" in sys.argv:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
raise VLBridgeError("no assistant message")
"""


@pytest.mark.parametrize("stdout", ["full", "as it is"])
def test_a_report_needs_neither_stdout_nor_the_error_file_of_another_launcher(tmp_path: Path, stdout: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "error.json")
    command = [sys.executable, "-c", REJECTING, stdout]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=50)
    assert run.stderr.startswith("Error: no assistant message\n")
    assert "Traceback" not in run.stderr
    assert run.returncode != 0
    assert not list(tmp_path.iterdir())


def test_the_report_of_our_error_is_its_message() -> None:
    assert (
        describe(VLBridgeError("a.jsonl, line 3: no assistant message"))
        == "Error: a.jsonl, line 3: no assistant message"
    )
    assert describe(MismatchError("the tensors differ", {"a": ["b"]})) == "Error: the tensors differ"


def test_the_report_of_our_error_in_a_data_loader_worker_is_its_message() -> None:
    def fail() -> None:
        try:
            raise VLBridgeError("the cause")
        except VLBridgeError as error:
            raise VLBridgeError("a.jsonl, line 3: no assistant message\nAdd one") from error

    try:
        fail()
    except VLBridgeError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(VLBridgeError, match="Original Traceback") as failure:
        wrapped.reraise()
    assert describe(failure.value) == "Error: a.jsonl, line 3: no assistant message\nAdd one"


def test_the_report_of_another_exception_is_its_traceback_with_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ZeroDivisionError) as failure:
        1 / 0  # noqa: B018
    text = describe(failure.value)
    assert text.startswith("Unexpected error on rank 3:\nTraceback")
    assert text.endswith("ZeroDivisionError: division by zero")


ARGUMENTS = {
    "bf16": False,
    "seq_length": 4096,
    "global_batch_size": 64,
    "train_iters": 1000,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "data_parallel_size": 4,
    "world_size": 8,
    "cpu": True,
    "load": None,
    "pretrained_checkpoint": None,
    "hf_weights": True,
    "hf_folder": "hf",
    "allow_unverified": [],
}


@pytest.mark.parametrize("tied", [False, True])
def test_the_summary_counts_the_parameters_like_transformers(tmp_path: Path, tied: bool) -> None:
    folder = reference.write_checkpoint(tmp_path, tied=tied)
    lines = summary(SimpleNamespace(**ARGUMENTS), read_config(folder))
    count = Qwen3VLForConditionalGeneration.from_pretrained(folder).num_parameters()
    assert lines[0] == f"model    Qwen3VLForConditionalGeneration, {count:,} parameters, fp32"
    assert lines[1:] == [
        "layout   TP 2 x SP x DP 4, 8 processes on the CPU",
        "batch    64 packs of 4,096 tokens (262,144), 1,000 iterations",
        "weights  from hf",
    ]
    allowed = ARGUMENTS | {"allow_unverified": ["tp+ep", "fp16"]}
    unverified = "warning  not verified equal to transformers: tp+ep, fp16"
    assert summary(SimpleNamespace(**allowed), read_config(folder)) == [*lines, unverified]


TRACKERS = {"tensorboard_dir": None, "wandb_project": "", "wandb_exp_name": "", "wandb_save_dir": "", "save": None}


@pytest.mark.parametrize(
    ("given", "package"), [({"tensorboard_dir": "log"}, "tensorboard"), ({"wandb_project": "p"}, "wandb")]
)
def test_a_tracker_without_its_package_is_rejected(
    given: dict[str, str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with rejects(f"the package {package} is not installed", f"pip install 'megatron-vlbridge[{package}]'"):
        check_trackers(SimpleNamespace(**{**TRACKERS, **given}))


def test_wandb_without_the_arguments_that_megatron_needs_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(SimpleNamespace(**TRACKERS))
    for package in ("wandb", "tensorboard"):
        module = ModuleType(package)
        module.__spec__ = SimpleNamespace(origin=f"{package}/__init__.py")  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, package, module)
    with rejects("--tensorboard-dir", "--wandb-exp-name", "--wandb-save-dir"):
        check_trackers(SimpleNamespace(**{**TRACKERS, "wandb_project": "p"}))
    enough = {"wandb_project": "p", "tensorboard_dir": "log", "wandb_exp_name": "n", "save": "out"}
    check_trackers(SimpleNamespace(**{**TRACKERS, **enough}))
