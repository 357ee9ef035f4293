"""Published forms in a live model, and the checkpoints that Megatron's own pretrain saves beside optimizer state."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.families import find
from tests import digits_checkpoint, fp8_checkpoint, reference
from tests.functional import ranks
from tests.functional.launch import run_example
from tests.functional.pool import Layout, Pool


def live_weights(layout: Layout, folder: Path, rows: int, checkpoint: Path | None = None) -> list[ranks.Shard]:
    """On a rank: the shards of a model filled from `folder`, or by Megatron's own loader from `checkpoint`."""
    model = ranks.build_model(layout, folder, vocab_size=rows, load=checkpoint is None)
    if checkpoint is not None:
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))["model"])
    return ranks.weight_shards(model)


def as_hf(folder: Path, megatron: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    table = find(config).table_for(config, SafetensorsFolder(folder).table)
    return table.to_hf(megatron)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def test_older_names_and_eight_bits_are_loaded_into_a_sharded_model(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path / "hf", shard="1GB")
    expected = fp8_checkpoint.quantise_folder(folder)
    assert sum(fp8_checkpoint.is_quantised(name) for name in expected) == 28
    spelling = {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head.": "lm_head."}
    found = {
        spelling[part] + name.removeprefix(part): tensor
        for name, tensor in weights_of(folder).items()
        for part in spelling
        if name.startswith(part)
    }
    save_file(found, folder / "model.safetensors")
    results = pool.run(live_weights, Layout(tp=2, pp=2, sp=True, world=4), folder=folder, rows=192)
    live = as_hf(folder, ranks.assemble(results))
    assert live.keys() == expected.keys()
    assert all(torch.equal(live[name], expected[name].float()) for name in expected)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_checkpoint.write(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_checkpoint.write(tmp_path_factory.mktemp("experts"), experts=True)


def train(folder: Path, processes: int, *arguments: object) -> None:
    common = ("--conversations", folder / "train.jsonl", "--hf-folder", "hf", "--hf-weights", "--seq-length", 256)
    common += ("--micro-batch-size", 1, "--global-batch-size", 2, "--lr", 1e-3, "--lr-decay-style", "constant")
    common += ("--train-iters", 2, "--save-interval", 2, "--num-workers", 0, "--pack-multiple-of", 4, "--seed", 5)
    run_example(folder, *common, *arguments, processes=processes)


TENSOR = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
OPTIMIZER = ("--use-distributed-optimizer",)
RUNS: dict[str, tuple[int, tuple[object, ...]]] = {
    "sharded": (4, (*TENSOR, "--pipeline-model-parallel-size", 2, "--bf16", *OPTIMIZER)),
    "async": (2, (*TENSOR, *OPTIMIZER, "--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")),
    "reshardable-optimizer": (2, (*TENSOR, *OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")),
    "experts": (2, ("--expert-model-parallel-size", 2, "--bf16", *OPTIMIZER)),
}


@pytest.mark.layouts
@pytest.mark.parametrize("kind", RUNS)
def test_of_what_a_run_saves_only_the_weights_are_exported(pool: Pool, dense: Path, experts: Path, kind: str) -> None:
    """The oracle is Megatron's own loader, in one process, into a model whose vocabulary has as many rows."""
    digits = experts if kind == "experts" else dense
    processes, arguments = RUNS[kind]
    train(digits, processes, *arguments, "--save", kind)
    saved, hf = digits / kind / "iter_0000002", digits / "hf"
    metadata = (saved / ".metadata").read_bytes()
    assert b"optimizer." in metadata
    embedding = TorchDistFolder(digits / kind).table["language_model.embedding.word_embeddings.weight"]
    assert embedding.shape[0] > 333
    (shards,) = pool.run(live_weights, Layout(), folder=hf, rows=embedding.shape[0], checkpoint=saved)
    megatron = ranks.assemble([shards])
    expected = as_hf(hf, megatron)
    exported = weights_of(export_checkpoint(digits / kind, digits / f"exported-{kind}", like=hf))
    before = weights_of(hf)
    assert exported.keys() == before.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == embedding.dtype
        assert torch.equal(tensor.float(), expected[name]), name
    assert not torch.equal(exported[name].float(), before[name])
    # There and back again, without the run.
    again = import_checkpoint(digits / f"exported-{kind}", digits / f"again-{kind}")
    report = verify(digits / kind, again)
    assert report.equal, report.differences
    assert report.compared == len(megatron)
    assert not verify(digits / kind, import_checkpoint(hf, digits / f"before-{kind}")).equal
    assert all(
        torch.equal(x, exported[n]) for n, x in weights_of(export_checkpoint(again, digits / f"b-{kind}")).items()
    )
