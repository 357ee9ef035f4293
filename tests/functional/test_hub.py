"""A Hub id where a folder is asked for: from a prepared cache, without network, through the commands and functions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.cli import main
from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.functional.pool import Layout
from tests.unit.test_convert import assert_same_bits, tensors

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


def use_cache(cache: Path) -> None:
    """What huggingface_hub reads from HF_HUB_CACHE and HF_HUB_OFFLINE when it is imported."""
    huggingface_hub.constants.HF_HUB_CACHE, huggingface_hub.constants.HF_HUB_OFFLINE = str(cache / "hub"), True


@pytest.fixture
def vlbridge(cache, monkeypatch, capsys):
    """Run `vlbridge`; gives its exit code, output and errors."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", None)
    use_cache(cache)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a_process_finds_an_id_in_the_cache_that_its_environment_names(cache, tmp_path):
    environment = os.environ | {"HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_vlbridge.cli", "import", ID, str(tmp_path / "megatron"), "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"].endswith(REVISION)
    assert verify(cache / "plain", tmp_path / "megatron").equal


def test_an_export_takes_the_other_files_of_an_id(vlbridge, cache, tmp_path):
    """From what a training run leaves, which knows of no Hugging Face folder."""
    import_checkpoint(cache / "plain", tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    code, _, errors = vlbridge("export", tmp_path / "megatron", tmp_path / "back", "--like", ID)
    assert code == 0, errors
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir() if path.name != CHECKSUMS}
    assert found == {path.name: path.read_bytes() for path in (cache / "plain").iterdir()}


@pytest.mark.parametrize("swapped", [False, True], ids=["first", "second"])
def test_an_id_is_compared(swapped, vlbridge, cache, tmp_path):
    other = Path(shutil.copytree(cache / "plain", tmp_path / "other"))
    for expected in (0, 1):
        pair = [ID, other]
        code, output, errors = vlbridge("verify", *(reversed(pair) if swapped else pair), "--json")
        assert code == expected, errors
        assert len(json.loads(output)["differences"]) == expected
        path = next(other.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x77")


def test_an_id_is_inspected(vlbridge, cache):
    code, output, errors = vlbridge("inspect", f"{ID}@{REVISION}", "--json")
    assert code == 0, errors
    assert json.loads(output)["tensors"] == inspect(cache / "plain").as_json()["tensors"]


def test_the_config_of_an_id_is_read(vlbridge, cache):
    assert read_config(find_folder(ID, weights=False)) == read_config(cache / "plain")


def load_on_rank(layout: Layout, cache: Path) -> dict[str, torch.Tensor]:
    """The weights of a live model, loaded from an id."""
    from megatron_vlbridge import export_hf_weights, load_hf_weights
    from tests.functional import ranks

    use_cache(cache)
    (model,) = ranks.build_chunks(layout, cache / "plain", load=False)
    load_hf_weights(model, ID)
    return dict(export_hf_weights(model))


def test_a_live_model_is_loaded_from_an_id(cache, pool):
    (loaded,) = pool.run(load_on_rank, Layout(), cache=cache)
    assert_same_bits(loaded, tensors(cache / "plain"))


def parse_on_rank(layout: Layout, cache: Path) -> tuple[str, int, int]:
    from megatron.training.global_vars import unset_global_variables

    from megatron_vlbridge.training.pretrain import parse_arguments

    use_cache(cache)
    sys.argv = ["pretrain", "--cpu", "--hf-folder", ID, "--seq-length", "64", "--train-iters", "1", "--lr", "1"]
    sys.argv += ["--random-weights"]
    args = parse_arguments()
    unset_global_variables()
    return args.hf_folder, args.num_layers, args.hidden_size


def test_a_training_run_reads_the_folder_of_an_id(cache, pool):
    """Everything after the arguments reads the folder that they name."""
    ((folder, *sizes),) = pool.run(parse_on_rank, Layout(), cache=cache)
    assert (Path(folder) / "config.json").read_bytes() == (cache / "plain" / "config.json").read_bytes()
    assert sizes == [2, 64]


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


def test_an_id_that_the_cache_lacks_is_refused_by_name(vlbridge, tmp_path):
    code, _, errors = vlbridge("import", "some-org/Other@main", tmp_path / "megatron")
    assert code == 1
    assert "some-org/Other@main: expected a folder" in errors
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
