"""A Hub id where a folder is asked for: from a prepared cache, without network, through the command itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.hub import find_folder
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from tests import reference

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The Hub's cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    folder = tmp_path_factory.mktemp("cache")
    hf = reference.write_checkpoint(folder / "plain", layers=2)
    repository = folder / "hub" / "models--some-org--Tiny-VL"
    snapshot = repository / "snapshots" / REVISION
    for place in (repository / "refs", repository / "blobs", snapshot):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(hf.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    return folder


def vlbridge(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_vlbridge.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_id_is_found_in_the_cache(cache, tmp_path):
    done = vlbridge(cache, "import", "some-org/Tiny-VL", str(tmp_path / "megatron"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"].endswith(REVISION)
    assert verify(cache / "plain", tmp_path / "megatron").equal


def test_an_id_that_the_cache_lacks_is_refused_by_name(cache, tmp_path):
    done = vlbridge(cache, "import", "some-org/Other@main", str(tmp_path / "megatron"))
    assert done.returncode == 1
    assert "some-org/Other@main: expected a folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "megatron").exists()


def test_a_snapshot_folder_is_a_folder(cache, tmp_path):
    snapshot = cache / "hub" / "models--some-org--Tiny-VL" / "snapshots" / REVISION
    import_checkpoint(snapshot, tmp_path / "megatron")
    assert verify(cache / "plain", tmp_path / "megatron").equal
    kept = {path.name for path in (tmp_path / "megatron" / "hf").iterdir()}
    assert "config.json" in kept
    assert not any(path.is_symlink() for path in (tmp_path / "megatron").rglob("*"))


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "../a/b", "/no/such", "~x/y", "a/b@", "http://a/b"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name):
    with pytest.raises(VLBridgeError, match="expected a folder"):
        find_folder(name)


def test_a_path_comes_before_an_id(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("a/b") == Path("a/b")
