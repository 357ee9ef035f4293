"""An MTP layer that the checkpoint lacks: rejected, or started at random where that is asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint
from megatron_vlbridge.families import ExpertForm, find
from tests import digits_checkpoint, mtp_reference, reference
from tests.functional import live_ranks, ranks
from tests.functional.launch import run_example
from tests.functional.pool import Layout, Pool

LAYOUTS = {
    "dense": Layout(tp=2, sp=True, pp=2, world=4),
    "linear": Layout(cp=2, world=2),
    "linear-experts": Layout(ep=2, pp=2, vpp=2, world=4),
}


def ask_for_mtp(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_all_but_the_mtp_layer_is_loaded(pool: Pool, tmp_path: Path, kind: str) -> None:
    folder = reference.write_checkpoint(tmp_path, **reference.KINDS[kind])
    ask_for_mtp(folder)
    config = read_config(folder)
    shards = pool.run(live_ranks.random_mtp, LAYOUTS[kind], folder=folder)
    found = find(config).table(config, ExpertForm.FUSED_OUT_IN).to_hf(ranks.assemble(shards))
    expected = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    started = {name: found.pop(name) for name in list(found) if name.startswith("mtp.")}
    assert found.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []
    assert set(started) >= {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight"}
    std = config.text.initializer_range
    for name, x in started.items():
        # The last projections start smaller, by the number of layers.
        assert x.std() < 1e-6 if "norm" in name else 0.1 * std < x.std() < 1.5 * std, name


def test_without_being_asked_for_it_is_rejected(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    ask_for_mtp(folder)
    with pytest.raises(AssertionError, match=r"expected the tensors of the MTP layer.*--random-mtp"):
        pool.run(ranks.build_chunks, Layout(), folder=folder)


@pytest.mark.parametrize(("mtp", "words"), [(True, "found some"), (False, "mtp_num_hidden_layers 1 .* found 0")])
def test_a_layer_that_is_there_and_one_that_the_config_lacks_are_rejected(
    pool: Pool, tmp_path: Path, mtp: bool, words: str
) -> None:
    folder = (mtp_reference.write_mtp_checkpoint if mtp else reference.write_checkpoint)(tmp_path)
    with pytest.raises(AssertionError, match=words):
        pool.run(live_ranks.random_mtp, Layout(), folder=folder)


def test_a_run_learns_it_and_exports_it(tmp_path: Path) -> None:
    folder = digits_checkpoint.write(tmp_path)
    ask_for_mtp(folder / "hf")
    common = (
        "--conversations",
        "train.jsonl",
        "--hf-folder",
        "hf",
        "--hf-weights",
        "--random-mtp",
        "--seq-length",
        256,
    )
    common += ("--global-batch-size", 2, "--lr", 1e-3, "--lr-decay-style", "constant", "--train-iters", 6)
    output = run_example(folder, *common, "--save", "run", "--save-interval", 6, "--log-interval", 1, "--seed", 5)
    losses = [float(line.split("mtp_1 loss")[1].split()[0]) for line in output.splitlines() if "mtp_1 loss" in line]
    assert losses[-1] < losses[0], output
    exported = export_checkpoint(folder / "run", folder / "trained", like=folder / "hf")
    names = {name for file in exported.glob("*.safetensors") for name in load_file(file)}
    assert "mtp.fc.weight" in names
    assert read_config(exported).text.num_mtp_layers == 1
