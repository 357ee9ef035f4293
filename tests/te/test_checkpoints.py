"""Models of Transformer Engine's modules have the CPU backend's checkpoints, in every family, without a GPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import reference
from tests.functional.pool import Layout
from tests.mtp_reference import write_mtp_checkpoint
from tests.te import models
from tests.te.pool import Pool

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-tied": {"tied": True},
    "experts": {"experts": {}},
    "experts-and-dense-layers": {"experts": {"mlp_only_layers": [1]}},
    "dense-mtp": {},
    "experts-mtp": {"experts": {}, "tied": True},
    "linear": {"linear": {}},
    "linear-experts-mtp": {"linear": {}, "experts": {}},
}
ONE = Layout()
LAYOUTS = {
    "tp2": ("dense", Layout(tp=2, sp=True, world=2)),
    "ep2": ("experts", Layout(ep=2, world=2)),
    "tp2-etp1-ep2": ("experts", Layout(tp=2, sp=True, etp=1, ep=2, world=2)),
    "linear-tp2": ("linear", Layout(tp=2, sp=True, world=2)),
    "tp2-etp2": ("experts-and-dense-layers", Layout(tp=2, sp=True, etp=2, world=2)),
}
DTYPES = (torch.float32, torch.bfloat16)
STRICT = ("assume_ok_unexpected", "raise_unexpected")

Shards = list[Any]
Pools = dict[str, Pool]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: (write_mtp_checkpoint if kind.endswith("mtp") else reference.write_checkpoint)(
            tmp_path_factory.mktemp(kind), **arguments
        )
        for kind, arguments in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def pools(pool: Pool, cpu_pool: Pool) -> Pools:
    return {"cpu": cpu_pool, "te": pool}


@pytest.fixture(scope="module")
def described(pools: Pools, folders: dict[str, Path]) -> Callable[[str], dict[tuple[str, torch.dtype], Any]]:
    """What a backend's process has of each family in each dtype."""

    @cache
    def of(backend: str) -> dict[tuple[str, torch.dtype], Any]:
        cases = [(kind, dtype) for kind in FAMILIES for dtype in DTYPES]
        calls = [(models.describe, (folders[kind], dtype)) for kind, dtype in cases]
        (found,) = pools[backend].run(models.each, ONE, calls=calls)
        return dict(zip(cases, found, strict=True))

    return of


@pytest.fixture(scope="module")
def saved(
    pools: Pools, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[Shards]]]:
    """What a backend's ranks held after `load_hf_weights`, and where Megatron's saver wrote it."""

    @cache
    def by(backend: str, kind: str, layout: Layout = ONE) -> tuple[Path, list[Shards]]:
        saved = tmp_path_factory.mktemp("saved")
        return saved, pools[backend].run(models.load_hf_and_save, layout, folder=folders[kind], saved=saved)

    return by


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_keys_shapes_and_dtypes_are_the_cpu_backends(
    described: Callable[..., Any], kind: str, dtype: torch.dtype
) -> None:
    assert described("te")[kind, dtype] == described("cpu")[kind, dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_the_same_parts(pools: Pools, folders: dict[str, Path], layout: str) -> None:
    kind, parts = LAYOUTS[layout]
    cpu, te = (
        pools[backend].run(models.describe, parts, folder=folders[kind], dtype=torch.float32) for backend in pools
    )
    assert te == cpu


def test_the_modules_are_transformer_engines(pool: Pool, folders: dict[str, Path]) -> None:
    """Else all of the above would compare the CPU backend with itself."""
    (found,) = pool.run(models.classes, ONE, folder=folders["experts-and-dense-layers"])
    expected = {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "RMSNorm"}
    assert expected | {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"} <= found
    assert not found & {"PackedAttention", "SequentialMLP"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_hugging_face_weights_fill_it_bit_for_bit(
    saved: Callable[..., Any], folders: dict[str, Path], kind: str
) -> None:
    _, shards = saved("te", kind)
    assert_equal_to_source(shards, folders[kind])


@pytest.mark.parametrize("kind", FAMILIES)
def test_megatron_loads_an_imported_checkpoint(pool: Pool, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """With either strictness of its loader."""
    import_checkpoint(folders[kind], tmp_path / "imported")
    calls = [(models.load, (folders[kind], tmp_path / "imported" / "release", strict)) for strict in STRICT]
    (found,) = pool.run(models.each, ONE, calls=calls)
    for shards in found:
        assert_equal_to_source([shards], folders[kind])


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "te"), ("te", "cpu"), ("te", "te")])
@pytest.mark.parametrize("kind", FAMILIES)
def test_megatron_loads_what_either_backend_saved(
    pools: Pools, saved: Callable[..., Any], folders: dict[str, Path], kind: str, writer: str, reader: str
) -> None:
    written, _ = saved(writer, kind)
    shards = pools[reader].run(models.load, ONE, folder=folders[kind], saved=written, strict=STRICT[0])
    assert_equal_to_source(shards, folders[kind])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_model_is_filled_and_saved(
    cpu_pool: Pool, saved: Callable[..., Any], folders: dict[str, Path], layout: str
) -> None:
    kind, parts = LAYOUTS[layout]
    written, shards = saved("te", kind, parts)
    assert_equal_to_source(shards, folders[kind])
    shards = cpu_pool.run(models.load, ONE, folder=folders[kind], saved=written, strict=STRICT[0])
    assert_equal_to_source(shards, folders[kind])


def assert_equal_to_source(shards: list[Shards], folder: Path) -> None:
    """The ranks' parameters, turned back by the rules, are the folder's tensors bit for bit."""
    from tests.functional.ranks import assemble

    config = read_config(folder)
    found = find(config).table(config, ExpertForm.FUSED_OUT_IN).to_hf(assemble(shards))
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different
