"""Weights for inference servers: specs without a model, FP8 of whole matrices, and ranks that stop."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.live import WeightDigests
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS, verify_checksums
from tests import mtp_reference, reference
from tests.cases import in_turn
from tests.functional import export_ranks
from tests.functional.pool import Layout, Pool
from tests.unit.test_fp8_export import SIZES, reference_of, same_bytes

# Tensor-parallel slices of 150 rows and the like, none of which is a whole block.
SHAPES: dict[str, Any] = {"text_fields": SIZES, "vision_fields": {"out_hidden_size": 160}}
CASES = [
    ("dense", Layout(tp=2, pp=2, world=4)),
    ("experts", Layout()),
    ("dense", Layout(pp=2, vpp=2, world=2)),
    ("dense", Layout(cp=2, world=4)),
    ("experts", Layout(tp=2, sp=True, etp=2, ep=2, world=4)),
    ("linear-experts", Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=4)),
    ("prediction", Layout(ep=2, pp=2, world=4)),
    ("linear", Layout(tp=2, world=2)),
    ("experts", Layout(ep=2, pp=2, vpp=2, world=4)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"fp8": True},
    {"dtype": "bfloat16", "fp8": True, "experts": "hub"},
    {"experts": "hub"},
    {"dtype": torch.float16},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sync")
    written = {
        kind: reference.write_checkpoint(folder / kind, **SHAPES, **options)
        for kind, options in reference.KINDS.items()
    }
    return written | {"prediction": mtp_reference.write_mtp_checkpoint(folder / "prediction", experts={}, **SHAPES)}


@pytest.fixture(scope="module")
def plain(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights with single experts."""
    folder = tmp_path_factory.mktemp("plain")
    result = {}
    for kind, source in sources.items():
        experts = None if kind in ("dense", "linear") else "per_expert"
        imported = import_checkpoint(source, folder / f"megatron-{kind}")
        result[kind] = weights_of(export_checkpoint(imported, folder / kind, experts=experts))
    return result


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize(("kind", "layout"), in_turn(CASES, 3), ids=str)
def test_the_specs_are_what_is_exported_on_every_rank(
    pool: Pool, sources: dict[str, Path], kind: str, layout: Layout
) -> None:
    """In their order, whatever the layout."""
    for result in pool.run(export_ranks.export_all, layout, folder=sources[kind], options=OPTIONS):
        for weights, specs in result:
            assert [(name, tuple(x.shape), x.dtype) for name, x in weights] == specs
            assert len(specs) > 50


@pytest.mark.parametrize(("kind", "layout"), in_turn(CASES, 4), ids=str)
def test_blocks_are_those_of_whole_matrices(
    pool: Pool, sources: dict[str, Path], plain: dict[str, dict[str, torch.Tensor]], kind: str, layout: Layout
) -> None:
    """To the last bit, on every rank, in every mode and run; values and scales of a tensor come together."""
    expected = reference_of(plain[kind])
    results = pool.run(export_ranks.export_fp8, layout, folder=sources[kind])
    order = [name for name, _ in results[0]["all"]]
    for result in results:
        assert same_bytes(dict(result["all"]), expected)
        assert same_bytes(dict(result["again"]), expected)
        assert [name for name, _ in result["all"]] == [name for name, _ in result["again"]] == order
    for name, scales in itertools.pairwise(order):
        assert (scales == f"{name}_scale_inv") == (expected[name].dtype == torch.float8_e4m3fn)
    assert same_bytes(dict(results[0]["first"]), expected)
    assert not any(result["first"] for result in results[1:])
    shared = [pair for result in results for pair in result["shared"]]
    assert same_bytes(dict(shared), expected)
    assert len(shared) == len(expected)
    for result in results:
        mine = {name for name, _ in result["shared"]}
        assert all(name.removesuffix("_scale_inv") in mine for name in mine)


@pytest.mark.parametrize(
    ("kind", "layout"),
    in_turn([("linear-experts", Layout(ep=2, pp=2, world=4)), ("dense", Layout(tp=2, world=2))], 2),
    ids=str,
)
def test_a_saved_folder_is_that_of_an_export(
    pool: Pool, sources: dict[str, Path], tmp_path: Path, kind: str, layout: Layout
) -> None:
    options: dict[str, Any] = {"fp8": True, "max_shard_size": 300_000, "dtype": "bfloat16"}
    expected = export_checkpoint(import_checkpoint(sources[kind], tmp_path / "m"), tmp_path / "exported", **options)
    target = tmp_path / "saved"
    pool.run(export_ranks.save, layout, folder=sources[kind], target=target, **options)
    found, wanted = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKSUMS}
        for folder in (target, expected)
    )
    assert found == wanted
    assert len([name for name in found if name.endswith(".safetensors")]) > 2
    assert verify_checksums(target).equal


STOPPED = r"rank 1: expected to go on with the export of weights, found that it has stopped\. Take all"


@pytest.mark.parametrize(("mode", "by"), [("all", "error"), ("shared", "break")])
def test_a_rank_that_stops_is_named_to_the_others(pool: Pool, sources: dict[str, Path], mode: str, by: str) -> None:
    layout = Layout(tp=2, pp=2, world=4)
    told = pool.run(export_ranks.stop, layout, folder=sources["dense"], mode=mode, who=[1], after=3, by=by)
    assert told.pop(1) == {"error": "the engine is gone", "break": "stopped"}[by]
    assert all(re.match(STOPPED, text) for text in told)


def test_ranks_that_all_stop_after_one_tensor_are_told_nothing(pool: Pool, sources: dict[str, Path]) -> None:
    layout, source = Layout(tp=2, world=2), sources["dense"]
    told = pool.run(export_ranks.stop, layout, folder=source, mode="all", who=[0, 1], after=3, by="break")
    assert told == ["stopped"] * 2


def test_a_rank_that_stops_among_the_last_tensors_stops_none(pool: Pool, sources: dict[str, Path]) -> None:
    layout, source = Layout(tp=2, world=2), sources["dense"]
    last = len(weights_of(source)) - 1
    told = pool.run(export_ranks.stop, layout, folder=source, mode="all", who=[1], after=last, by="break")
    assert told == ["all", "stopped"]


@pytest.mark.parametrize("mode", ["all", "shared"])
def test_only_what_has_changed_is_sent(pool: Pool, sources: dict[str, Path], mode: str) -> None:
    """To the last bit, by the same names on every rank; everything after other options or an export that was left."""
    layout, source = Layout(tp=2, pp=2, world=4), sources["dense"]
    names = set(weights_of(source))
    changed = {"model.language_model.layers.0.mlp.down_proj.weight", "model.language_model.norm.weight"}
    results = pool.run(export_ranks.export_changes, layout, folder=source, mode=mode)
    assert all(same for result in results for _, _, same in result)
    expected = [names, set(), changed, names, None, names, set()]
    for number, sent in enumerate(expected):
        found = [result[number][0] for result in results]
        left_out = {result[number][1] for result in results}
        assert len(left_out) == 1
        if sent is None:  # the first rank stops
            assert left_out == {()}
            assert len(found[0]) == 5
            continue
        assert set(left_out.pop()) == names - sent
        if mode == "all":
            assert all(set(one) == sent for one in found)
        else:
            assert sorted(name for one in found for name in one) == sorted(sent)


FP8: dict[str, Any] = {"fp8": True}
# The options of both ranks, and what both are told.
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "inf to some": ([FP8 | {"value": torch.inf, "ranks": "shared"}] * 2, r"fc2.weight.*: expected finite .*found inf"),
    "nan to one": ([FP8 | {"value": torch.nan, "ranks": "first"}] * 2, r"fc2.weight.*: expected finite .*found nan"),
    "save nan": ([FP8 | {"value": torch.nan}] * 2, r"down_proj\.weight: expected finite .*found nan"),
    "fp8 on one": ([FP8, {}], r"rank 1: expected the options of rank 0, .*'fp8': True.*'fp8': False"),
    "float16": ([FP8 | {"dtype": "float16"}] * 2, "expected float32 or bfloat16 for an export in FP8"),
    "save float16": ([FP8 | {"dtype": "float16"}] * 2, "expected float32 or bfloat16 for an export in FP8"),
    "a dtype on one": ([FP8, FP8 | {"dtype": "float8"}], "dtype: expected one of"),
    "receivers": ([{}, {"ranks": "nobody"}], "ranks: expected one of all, first, shared, found 'nobody'"),
    "experts": ([{}, {"experts": "hup"}], "experts: expected one of hub, .* found 'hup'"),
    "digests on one": ([{}, {"digests": WeightDigests()}], "rank 1: expected the options of rank 0"),
    "other values": ([FP8] * 2, "accepted"),
}


def test_every_rank_is_told(pool: Pool, sources: dict[str, Path], tmp_path: Path) -> None:
    """Also where only one has a wrong option; what is not quantised may have any value."""
    cases = {case: options for case, (options, _) in REFUSED.items()}
    arguments = {"cases": cases, "target": tmp_path / "saved"}
    for told in pool.run(export_ranks.refusals, Layout(pp=2, world=2), folder=sources["dense"], **arguments):
        for case, (_, text) in REFUSED.items():
            assert re.search(text, told[case]), (case, told[case])
    assert not list(tmp_path.iterdir())
