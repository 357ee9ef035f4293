import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge import cli
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.formats import TRACKER
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.torch_dist import writer as torch_dist_writer
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.cli.arguments import DTYPES, EXPERTS, size
from megatron_vlbridge.cli.commands import COMMANDS
from megatron_vlbridge.cli.parser import parse
from megatron_vlbridge.cli.progress import Meter
from megatron_vlbridge.config import WEIGHT_DTYPES
from megatron_vlbridge.families import ExpertForm
from megatron_vlbridge.families.experts import HUB
from tests import reference
from tests.unit import test_convert, test_convert_moe

ROOT = Path(__file__).parents[2]


def test_a_path_that_the_system_refuses_is_an_invalid_input(capsys: pytest.CaptureFixture[str]) -> None:
    """An OSError without a file is a fault of the program, and not hidden."""
    assert cli.main(["data", "check", "x" * 300 + ".jsonl", "--hf-folder", "y" * 300]) == 1
    assert capsys.readouterr().err.endswith(": File name too long\n")

    def fail(_: object) -> int:
        raise OSError("without a file")

    with pytest.raises(OSError, match="without a file"):
        cli._run(argparse.Namespace(run=fail, json=False, command="data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, `megatron` made from it, and `other` weights of the same shapes."""
    folder = tmp_path_factory.mktemp("model")
    import_checkpoint(reference.write_checkpoint(folder / "hf", layers=2), folder / "megatron")
    reference.write_checkpoint(folder / "other", layers=2, seed=1)
    return folder


def test_import_and_export_give_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 0
    assert cli.main(["export", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "megatron"), str(tmp_path / "back")]
    back = {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir() if p.name != CHECKSUMS}
    assert back == {p.name: p.read_bytes() for p in hf.iterdir()}


def test_unfit_input_exits_with_1_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    next(hf.glob("*-00002-*.safetensors")).unlink()
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 1
    assert "model-00002-of-" in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_every_mismatch_is_listed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    extras = {f"stray{number:02}": torch.zeros(3) for number in range(20)}
    test_convert.rewrite(hf, lambda found: found.update(extras))
    test_convert.rewrite(hf, lambda found: found.pop("lm_head.weight"))
    capsys.readouterr()
    found = run_json(capsys, "import", hf, tmp_path / "megatron")
    assert found["code"] == 1
    assert "do not match in 21 places" in found["error"]
    assert (
        found["misfits"]
        == found["mismatches"]
        == {
            "missing Hugging Face tensors": ["lm_head.weight: expected [128, 64]"],
            "extra Hugging Face tensors": [f"{name}: [3] float32, expected none of this name" for name in extras],
        }
    )
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "stray07" in err
    assert "stray08" not in err
    assert "All 21 are listed with --json" in err


def test_other_errors_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["import", tmp_path / "no", tmp_path / "x"], ["verify", tmp_path / "no"], ["inspect", tmp_path]):
        found = run_json(capsys, *arguments)
        assert (found["code"], found["mismatches"]) == (1, {})
        assert str(tmp_path) in found["error"]


def test_the_options_of_a_conversion_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square experts, so that --experts has to be said, and tensors that are no part of the model."""
    fill = test_convert.bits_without_nan
    out_in, in_out = (
        test_convert_moe.make(tmp_path / form, form, inner=16, fill=fill) for form in ("fused_out_in", "fused_in_out")
    )
    expected = test_convert.tensors(in_out)
    test_convert.rewrite(out_in, lambda found: found.update({"a.x": torch.zeros(3), "b.y": torch.ones(2)}))
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    read = ["import", str(out_in), str(megatron), "--dtype", "float32", "--ignore", "a.*", "--leave-out", "b.y"]
    assert cli.main(read) == 1
    assert "--experts fused_in_out" in capsys.readouterr().err
    assert cli.main([*read, "--experts", "fused_out_in"]) == 0
    options = ["--experts", "fused_in_out", "--dtype", "bfloat16", "--max-shard-size", "30kB"]
    assert cli.main(["export", str(megatron), str(back), *options]) == 0
    test_convert.assert_same_bits(test_convert.tensors(back), expected)
    largest = max(tensor.nbytes for tensor in expected.values())
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in back.glob("*.safetensors")]
    assert len(sizes) > 3  # the source is one file
    assert max(sizes) <= max(30_000, largest)
    assert (back / "config.json").read_bytes() == (in_out / "config.json").read_bytes()
    table = TorchDistFolder(megatron).table.values()
    assert {spec.dtype for spec in table} == {torch.float32}


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = cli.main([*map(str, arguments), "--json"])
    return {"code": code, **json.loads(capsys.readouterr().out)}


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    capsys.readouterr()
    plan = run_json(capsys, "import", hf, tmp_path / "megatron", "--dry-run", "--workers", "1")
    weights = sum(tensor.nbytes for path in hf.glob("*.safetensors") for tensor in load_file(path).values())
    assert plan["code"] == 0
    assert plan["bytes"] == weights
    assert plan["workers"] == 1
    assert plan["seconds_at_mb_per_s"]["100"] == weights / 1e8
    assert 0 < plan["memory_bytes"] <= 2**30
    assert cli.main(["import", str(hf), str(tmp_path / "megatron"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for said in ("every value covered once", "GB to write in", "GB free", "MiB of memory", "s at 100 MB/s"):
        assert said in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_verify_tells_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    other = reference.write_checkpoint(tmp_path / "other", layers=2, seed=1)
    assert cli.main(["import", str(hf), str(tmp_path / "megatron"), "--workers", "2", "--memory", "0.75GiB"]) == 0
    assert cli.main(["verify", str(hf), str(tmp_path / "megatron")]) == 0
    assert cli.main(["verify", str(tmp_path / "megatron")]) == 0
    capsys.readouterr()
    report = run_json(capsys, "verify", other, tmp_path / "megatron")
    assert report["code"] == 1
    assert report["equal"] is False
    assert len(report["differences"]) == report["compared"]
    assert cli.main(["verify", str(other), str(tmp_path / "megatron")]) == 1
    assert f"and {report['compared'] - 10} more" in capsys.readouterr().out


def test_inspect_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    capsys.readouterr()
    assert cli.main(["inspect", str(hf), "--pp", "1"]) == 0
    text = capsys.readouterr().out
    assert "stage 0: layers 0 to 1" in text
    assert len(text.splitlines()) == 4 + 5 + len({n for p in hf.glob("*.safetensors") for n in load_file(p)})
    assert cli.main(["inspect", str(hf), "--pp", "3"]) == 2
    assert "expected 1 to 2 stages" in capsys.readouterr().err
    found = run_json(capsys, "inspect", hf, "--pp", "2")
    assert found["code"] == 0
    assert found["stages"] == [[0, 1], [1, 2]]
    assert found["architecture"] == "Qwen3VLForConditionalGeneration"


def test_an_export_that_is_planned_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 0
    capsys.readouterr()
    plan = run_json(capsys, "export", tmp_path / "megatron", tmp_path / "back", "--dry-run")
    assert (plan["code"], plan["kind"]) == (0, "export")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def run_with_progress(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool, more: str = ""
) -> str:
    """What an import in tens of parts says on stderr."""
    monkeypatch.setattr(torch_dist_writer, "PART_BYTES", 20_000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    hf = reference.write_checkpoint(folder / "hf", layers=2)
    capsys.readouterr()
    assert cli.main(["import", str(hf), str(folder / "megatron"), *more.split()]) == 0
    return capsys.readouterr().err


def test_progress_is_one_line_on_a_terminal(tmp_path, capsys, monkeypatch) -> None:
    text = run_with_progress(tmp_path, capsys, monkeypatch, terminal=True)
    assert text.startswith("\r")
    assert text.count("\r") > 12
    assert text.endswith("\n")
    assert re.search(r"\r +\d+% \d+\.\d\d of \d+\.\d\d GB, \d+ MB/s, \d+ s left", text)
    assert text.count("\n") == 1


def test_progress_is_a_line_for_each_tenth_elsewhere(tmp_path, capsys, monkeypatch) -> None:
    text = run_with_progress(tmp_path, capsys, monkeypatch, terminal=False)
    assert "\r" not in text
    assert 5 <= len(text.splitlines()) <= 10
    assert text.splitlines()[-1].startswith("100% ")
    assert all("MB/s" in line for line in text.splitlines())


def test_progress_is_json_where_that_is_asked_for(tmp_path, capsys, monkeypatch) -> None:
    text = run_with_progress(tmp_path, capsys, monkeypatch, terminal=True, more="--json")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.keys() == {"done", "total", "resumed", "seconds"} for line in lines)
    assert lines[-1]["done"] == lines[-1]["total"] > lines[0]["done"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "__call__", interrupt)
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["import", str(hf), str(tmp_path / "megatron"), "--resume"]) == 0
    capsys.readouterr()
    assert run_json(capsys, "verify", tmp_path / "megatron")["equal"] is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("1000", 1000), ("5GB", 5 * 10**9), ("1GiB", 2**30), ("0.5 MiB", 2**19), ("2kB", 2000)],
        *[("4G", 4 * 10**9), ("512M", 512 * 10**6), ("4g", 4 * 10**9), ("1gib", 2**30), ("1tb", 10**12)],
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert size(text) == expected


WRONG = [
    *(f"import a b --memory={text}" for text in ("", "-1", "GB", "1XB", "1e9", "0", "1Gi", 400 * "9")),
    *("import a b --memory -1", "import a b --workers 0", "import a b --workers -2", "import a b --workers two"),
    *("import a", "import", "import a b c", "import a b --experts fused", "import a b --dtype float8"),
    *("export a b --max-shard-size 0", "export a b --max-shard-size -5GB", "import a b --like c"),
    *("inspect a --pp 0", "inspect a --pp -1", "verify", "improt a b", "--dry-run", ""),
]


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: vlbridge" in err


@pytest.mark.parametrize("option", ["--ignore=x", "--leave-out=x", "--experts=per_expert"])
def test_options_that_compare_need_two_checkpoints(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("verify", "a", option) == 2
    assert "expected A and B" in capsys.readouterr().err


def exit_code(*arguments: object) -> int | str | None:
    """What the shell gets, whether the command returns or argparse exits."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("improt a b", "import"),
        ("exprot a b", "export"),
        ("import a b --dytpe bf16", "--dtype"),
        ("export a b --max-shard-sizes=5GB", "--max-shard-size"),
        ("verify a b --leaveout x", "--leave-out"),
        ("export --lik-e x", "--like"),  # also where other arguments are missing
        ("import a b --dtype bfloat", "bfloat16"),
        ("import a b --dtype bf61", "bf16"),
        ("import a b --experts fused_inout", "fused_in_out"),
        ("verify a b --experts perexpert", "per_expert"),
    ],
)
def test_what_was_probably_meant_is_named(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*line.split()) == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_the_dtypes_are_those_of_the_config() -> None:
    assert set(DTYPES.values()) == set(WEIGHT_DTYPES)


def test_the_forms_of_experts_are_those_of_the_rules() -> None:
    assert (HUB, *ExpertForm) == EXPERTS


@pytest.mark.parametrize(("short", "name"), DTYPES.items())
def test_dtypes_have_short_names(short: str, name: str, model: Path, tmp_path: Path) -> None:
    assert cli.main(["import", str(model / "hf"), str(tmp_path / "megatron"), "--dtype", short]) == 0
    table = TorchDistFolder(tmp_path / "megatron").table.values()
    assert {spec.dtype for spec in table} == {getattr(torch, name)}


def test_values_that_fit_no_run_exit_with_2_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = model / "hf"
    assert exit_code("import", hf, tmp_path / "megatron", "--memory", 1) == 2
    assert "memory: expected at least" in capsys.readouterr().err
    assert run_json(capsys, "inspect", hf, "--pp", 9)["code"] == 2


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(command.summary[:30])}", err, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    text = capsys.readouterr().out
    examples = re.findall(r"^  vlbridge (.+)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert parse(example.split()).command == command
    assert max(map(len, text.splitlines())) <= 80


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"vlbridge {importlib.metadata.version('megatron-vlbridge')} (")
    assert f"torch {importlib.metadata.version('torch')}" in text


def test_help_and_version_import_no_torch() -> None:
    """Its import takes seconds; the help then takes a tenth of one."""
    code = """
import contextlib, io, sys
from megatron_vlbridge import cli
commands = [f"{name} --help" for name in ("import", "export", "merge", "verify", "inspect", "plot")]
for line in ("--help", *commands, "--version", "", "improt"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            cli.main(line.split())
print(*sorted({"torch", "numpy", "transformers", "megatron", "safetensors"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", ["inspect", "import", "export", "verify", "error", "help", "version"])
def test_a_reader_that_goes_away_changes_no_exit_code(command: str, model: Path, tmp_path: Path, monkeypatch) -> None:
    """As with `| head`: stdout and stderr are pipes that nobody reads any more."""
    hf, megatron = model / "hf", model / "megatron"
    lines = {
        "inspect": (0, ["inspect", hf]),
        "import": (0, ["import", hf, tmp_path / "new"]),
        "export": (0, ["export", megatron, tmp_path / "new"]),
        "verify": (1, ["verify", hf, model / "other"]),
        "error": (1, ["inspect", tmp_path / "none"]),
        "help": (0, ["import", "--help"]),
        "version": (0, ["--version"]),
    }
    expected, arguments = lines[command]
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    try:
        assert exit_code(*arguments) == expected
        sys.stdout.close()  # as the interpreter does at its end
        sys.stderr.close()
    finally:
        monkeypatch.undo()
    assert (tmp_path / "new").exists() == (command in ("import", "export"))


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_closed_changes_no_exit_code(
    closed: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `2>&-`; nothing goes to the other stream instead."""
    monkeypatch.setattr(sys, closed, None)
    assert exit_code("import", "--help") == 0
    assert cli.main(["import", str(model / "hf"), str(tmp_path / "new")]) == 0
    assert cli.main(["inspect", str(tmp_path / "none")]) == 1
    getattr(sys, closed).close()
    monkeypatch.undo()
    out, err = capsys.readouterr()
    if closed == "stderr":
        assert out.endswith(f"\n{tmp_path / 'new'}\n")
    else:
        assert "100%" in err


def test_a_folder_of_the_other_kind_is_named_with_the_command_for_it(model: Path, tmp_path: Path, capsys) -> None:
    hf, megatron = model / "hf", model / "megatron"
    for folder in (megatron, megatron / "release"):
        assert cli.main(["import", str(folder), str(tmp_path / "new")]) == 1
        assert "use vlbridge export" in capsys.readouterr().err
    assert cli.main(["export", str(hf), str(tmp_path / "new")]) == 1
    assert "use vlbridge import" in capsys.readouterr().err


def test_the_path_of_a_file_is_answered_with_its_folder(model: Path, tmp_path: Path, capsys) -> None:
    hf, megatron = model / "hf", model / "megatron"
    files = [hf / "config.json", hf / INDEX, next(hf.glob("*.safetensors"))]
    files += [next(megatron.rglob("*.distcp")), megatron / TRACKER, megatron / "release" / ".metadata"]
    for path in files:
        for line in (["import", path, "new"], ["export", path, "new"], ["inspect", path], ["verify", path, hf]):
            assert cli.main(list(map(str, line))) == 1
            assert f"Give the folder that holds it: {path.parent}." in capsys.readouterr().err, line


def test_like_may_be_an_imported_folder(model: Path, tmp_path: Path) -> None:
    hf, megatron = model / "hf", model / "megatron"
    assert cli.main(["export", str(megatron), str(tmp_path / "back"), "--like", str(megatron)]) == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_the_option_is_named_as_it_is_spelt_here(model: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(model / "megatron" / "release", tmp_path / "megatron")
    assert cli.main(["export", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 1
    assert "Give --like" in capsys.readouterr().err
