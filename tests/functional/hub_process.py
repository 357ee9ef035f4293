"""What is done with a Hub id in a process of its own, whose environment says where the Hub's cache is.

python -m tests.functional.hub_process FUNCTION ID FOLDER
"""

import sys
import tempfile
from pathlib import Path

from tests.functional.pool import Layout, _on_rank


def read(name: str, plain: Path) -> None:
    """The config of an id, for which no weights are fetched."""
    from megatron_vlbridge import read_config
    from megatron_vlbridge.checkpoint.hf.hub import find_folder

    assert read_config(find_folder(name, weights=False)) == read_config(plain)


def load(name: str, plain: Path) -> None:
    """A live model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        _on_rank(load_on_rank, Layout(), 0, str(Path(folder) / "store"), {"name": name, "plain": plain})


def load_on_rank(layout: Layout, name: str, plain: Path) -> None:
    import torch

    from megatron_vlbridge import export_hf_weights, load_hf_weights
    from tests.functional import ranks
    from tests.unit.test_convert import assert_same_bits, tensors

    (model,) = ranks.build_chunks(layout, plain, load=False)
    assert not all(torch.equal(tensor, tensors(plain)[key]) for key, tensor in export_hf_weights(model))
    load_hf_weights(model, name)
    assert_same_bits(dict(export_hf_weights(model)), tensors(plain))


def parse(name: str, plain: Path) -> None:
    """The arguments of a training run: everything later reads the folder that they name."""
    from megatron_vlbridge.training.pretrain import parse_arguments

    sys.argv = ["pretrain", "--cpu", "--hf-folder", name, "--seq-length", "64", "--train-iters", "1", "--lr", "1"]
    sys.argv += ["--random-weights"]
    args = parse_arguments()
    assert (Path(args.hf_folder) / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    assert (args.num_layers, args.hidden_size) == (2, 64)


if __name__ == "__main__":
    import tests.functional.preload  # noqa: F401  before Megatron is imported

    {"read": read, "load": load, "parse": parse}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
