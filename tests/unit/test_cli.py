from pathlib import Path

import pytest

from megatron_vlbridge import cli
from tests import reference


def test_import_and_export_give_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 0
    assert cli.main(["export", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "megatron"), str(tmp_path / "back")]
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in hf.iterdir()
    }


def test_unfit_input_exits_with_1_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    next(hf.glob("*-00002-*.safetensors")).unlink()
    assert cli.main(["import", str(hf), str(tmp_path / "megatron")]) == 1
    assert "model-00002-of-" in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_wrong_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["import", "only-one-folder"])
    assert stop.value.code == 2
