"""Models of Transformer Engine's modules have the CPU backend's checkpoints, in every family, without a GPU."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertLayout
from tests import reference
from tests.mtp_reference import write_mtp_checkpoint
from tests.te import models
from tests.te.processes import Processes

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-tied": {"tied": True},
    "experts": {"experts": {}},
    "experts-and-dense-layers": {"experts": {"mlp_only_layers": [1]}},
    "dense-mtp": {},
    "experts-mtp": {"experts": {}, "tied": True},
}
ONE: dict[str, int] = {}
LAYOUTS = {
    "tp2": ("dense", {"tensor_model_parallel_size": 2}),
    "ep2": ("experts", {"expert_model_parallel_size": 2}),
    "tp2-etp1-ep2": (
        "experts",
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
    ),
    "tp2-etp2": ("experts-and-dense-layers", {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: (write_mtp_checkpoint if kind.endswith("mtp") else reference.write_checkpoint)(
            tmp_path_factory.mktemp(kind), **arguments
        )
        for kind, arguments in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(backend, world, function, sizes, *args)`: the results of the ranks."""
    started: dict[tuple[str, int], Processes] = {}
    stores = tmp_path_factory.mktemp("stores")
    numbers = itertools.count()

    def run_on(backend: str, world: int, function: Callable[..., Any], sizes: dict[str, int], *args: Any) -> list[Any]:
        processes = started.get((backend, world)) or started.setdefault((backend, world), Processes(backend, world))
        return processes.run(function, stores / str(next(numbers)), sizes, *args)

    yield run_on
    for processes in started.values():
        processes.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_keys_shapes_and_dtypes_are_the_cpu_backends(
    run: Run, folders: dict[str, Path], kind: str, dtype: torch.dtype
) -> None:
    (cpu,) = run("cpu", 1, models.describe, ONE, folders[kind], dtype)
    (te,) = run("te", 1, models.describe, ONE, folders[kind], dtype)
    assert te == cpu


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_the_same_parts(run: Run, folders: dict[str, Path], layout: str) -> None:
    kind, sizes = LAYOUTS[layout]
    cpu = run("cpu", 2, models.describe, sizes, folders[kind], torch.float32)
    te = run("te", 2, models.describe, sizes, folders[kind], torch.float32)
    assert te == cpu


def test_the_modules_are_transformer_engines(run: Run, folders: dict[str, Path]) -> None:
    """Else all of the above would compare the CPU backend with itself."""
    (found,) = run("te", 1, models.classes, ONE, folders["experts-and-dense-layers"])
    expected = {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "RMSNorm"}
    assert expected | {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"} <= found
    assert not found & {"PackedAttention", "SequentialMLP"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_hugging_face_weights_fill_it_bit_for_bit(run: Run, folders: dict[str, Path], kind: str) -> None:
    (shards,) = run("te", 1, models.load_hf, ONE, folders[kind])
    assert_equal_to_source([shards], folders[kind])


@pytest.mark.parametrize("strict", ["assume_ok_unexpected", "raise_unexpected"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_megatron_loads_an_imported_checkpoint(
    run: Run, folders: dict[str, Path], kind: str, strict: str, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    import_checkpoint(folders[kind], imported)
    (shards,) = run("te", 1, models.load, ONE, folders[kind], imported / "release", strict)
    assert_equal_to_source([shards], folders[kind])


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "te"), ("te", "cpu"), ("te", "te")])
@pytest.mark.parametrize("kind", FAMILIES)
def test_megatron_loads_what_either_backend_saved(
    run: Run, folders: dict[str, Path], kind: str, writer: str, reader: str, tmp_path: Path
) -> None:
    run(writer, 1, models.load_hf_and_save, ONE, folders[kind], tmp_path / "saved")
    (shards,) = run(reader, 1, models.load, ONE, folders[kind], tmp_path / "saved", "assume_ok_unexpected")
    assert_equal_to_source([shards], folders[kind])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_model_is_filled_and_saved(run: Run, folders: dict[str, Path], layout: str, tmp_path: Path) -> None:
    kind, sizes = LAYOUTS[layout]
    assert_equal_to_source(run("te", 2, models.load_hf, sizes, folders[kind]), folders[kind])
    run("te", 2, models.load_hf_and_save, sizes, folders[kind], tmp_path / "saved")
    shards = run("cpu", 1, models.load, ONE, folders[kind], tmp_path / "saved", "assume_ok_unexpected")
    assert_equal_to_source(shards, folders[kind])


def assert_equal_to_source(shards: list[Any], folder: Path) -> None:
    """The ranks' parameters, turned back by the rules, are the folder's tensors bit for bit."""
    from tests.functional.ranks import assemble

    config = read_config(folder)
    found = find(config).table(config, ExpertLayout.FUSED_OUT_IN).to_hf(assemble(shards))
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different
