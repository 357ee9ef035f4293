"""A Hub id where a folder is asked for: from a prepared cache, without network, through the command itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from tests import reference

ROOT = Path(__file__).parents[2]
ID = "some-org/Tiny-VL"
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


def run(cache: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def vlbridge(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(cache, "megatron_vlbridge.cli", *arguments)


def test_an_id_is_found_in_the_cache(cache, tmp_path):
    done = vlbridge(cache, "import", ID, str(tmp_path / "megatron"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"].endswith(REVISION)
    assert verify(cache / "plain", tmp_path / "megatron").equal


def test_an_export_takes_the_other_files_of_an_id(cache, tmp_path):
    """From what a training run leaves, which knows of no Hugging Face folder."""
    assert vlbridge(cache, "import", str(cache / "plain"), str(tmp_path / "megatron")).returncode == 0
    shutil.rmtree(tmp_path / "megatron" / "hf")
    done = vlbridge(cache, "export", str(tmp_path / "megatron"), str(tmp_path / "back"), "--like", ID)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir() if path.name != CHECKSUMS}
    assert found == {path.name: path.read_bytes() for path in (cache / "plain").iterdir()}


@pytest.mark.parametrize("swapped", [False, True], ids=["first", "second"])
def test_an_id_is_compared(swapped, cache, tmp_path):
    other = Path(shutil.copytree(cache / "plain", tmp_path / "other"))
    for expected in (0, 1):
        pair = [ID, str(other)]
        done = vlbridge(cache, "verify", *(reversed(pair) if swapped else pair), "--json")
        assert done.returncode == expected, done.stderr
        assert len(json.loads(done.stdout)["differences"]) == expected
        path = next(other.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x77")


def test_an_id_is_inspected(cache):
    done = vlbridge(cache, "inspect", f"{ID}@{REVISION}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == inspect(cache / "plain").as_json()["tensors"]


@pytest.mark.parametrize("what", ["read", "load", "parse"])
def test_an_id_serves_functions_and_training_runs(what, cache):
    done = run(cache, "tests.functional.hub_process", what, ID, str(cache / "plain"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("weights", [False, True])
def test_weights_are_fetched_where_they_are_wanted(weights, monkeypatch, tmp_path):
    """What is asked of huggingface_hub: the weights of a large model take hours."""
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("some-org/Tiny-VL@main", weights=weights) == tmp_path
    assert (asked["repository"], asked["revision"]) == ("some-org/Tiny-VL", "main")
    assert ("*.safetensors" in asked["patterns"]) is weights
    assert "*.json" in asked["patterns"]


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
