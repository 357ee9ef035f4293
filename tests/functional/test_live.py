"""Weights into and out of live, sharded models: bit for bit what the Hugging Face folder holds."""

import json
import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS, verify_checksums
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.families import ExpertForm, find
from tests import mtp_reference, reference
from tests.cases import in_turn
from tests.functional import live_ranks, ranks
from tests.functional.live_ranks import BIG, MODES, TINY
from tests.functional.pool import Layout, Pool
from tests.unit.test_convert_moe import other_form

DENSE = [
    Layout(),
    Layout(world=2),
    Layout(tp=2, world=2),
    Layout(tp=4, sp=True, world=4),  # more than KV heads
    Layout(pp=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, pp=2, world=4),
    Layout(cp=2, world=4),
]
EXPERTS = [
    Layout(ep=4, world=4),
    Layout(tp=2, sp=True, etp=2, ep=2, world=4),
    Layout(ep=2, pp=2, vpp=2, world=4),
    Layout(tp=2, sp=True, pp=2, ep=2, world=8),
]
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "experts": {"experts": {}},
    "some-experts": {"experts": {"mlp_only_layers": [1]}},
    "linear": {"linear": {}},
    "linear-experts": {"linear": {}, "experts": {}},
}
Tensors = dict[str, torch.Tensor]
CASES = [("untied", layout) for layout in DENSE]
CASES += [("tied", layout) for layout in (Layout(), Layout(pp=2, world=2), Layout(pp=2, vpp=2, world=2))]
CASES += [("prediction", layout) for layout in (Layout(), Layout(ep=2, pp=2, world=4))]
CASES += [("linear", layout) for layout in (Layout(tp=2, cp=2, world=4), Layout(pp=2, vpp=2, world=2))]
CASES += [
    ("linear-experts", layout) for layout in (Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=4), Layout(cp=4, world=4))
]
CASES += [("experts", layout) for layout in EXPERTS] + [("some-experts", Layout(ep=2, pp=2, world=4))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("live")
    written = {kind: reference.write_checkpoint(folder / kind, **options) for kind, options in KINDS.items()}
    return written | {"prediction": mtp_reference.write_mtp_checkpoint(folder / "prediction", tied=True, experts={})}


@pytest.fixture(scope="module")
def wild(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with any bits as numbers, for tests that only move them."""
    folder = tmp_path_factory.mktemp("wild")
    return {kind: rewritten(source, folder / kind, with_wild_bits) for kind, source in sources.items()}


@pytest.fixture(scope="module")
def forms(wild: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wild experts in each of the forms that they are published in."""
    folder = tmp_path_factory.mktemp("forms")

    def in_form(name: str, x: torch.Tensor, form: str) -> Tensors:
        return other_form(name, x, form) if ".experts." in name and form != ExpertForm.FUSED_OUT_IN else {name: x}

    return {form: rewritten(wild["experts"], folder / form, in_form, form) for form in ExpertForm}


@pytest.fixture(scope="module")
def bfloat16(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untied checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "hf"
    return rewritten(sources["untied"], folder, lambda name, x: {name: x.bfloat16()})


def rewritten(source: Path, target: Path, change: Callable[..., Tensors], *arguments: Any) -> Path:
    """A copy of a folder with, in the place of each tensor, those that `change` makes of it."""
    target.mkdir()
    files: dict[str, str] = {}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            changed = [change(name, x, *arguments) for name, x in load_file(path).items()]
            tensors = {name: x.contiguous() for part in changed for name, x in part.items()}
            save_file(tensors, target / path.name, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    if content["weight_map"] != files:
        index.write_text(json.dumps(content | {"weight_map": files}))
    return target


def with_wild_bits(name: str, x: torch.Tensor) -> Tensors:
    """Zeros of both signs, infinities, numbers that are none, subnormal ones, and random bits."""
    first, last = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    bits = torch.randint(first, last, x.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(len(name)))
    planted = torch.tensor([0, first, 0x7F800000, 0x7F800001, 0x7FC00123, 1, first + 1, -0x800000], dtype=torch.int32)
    bits.view(-1)[: len(planted)] = planted
    return {name: bits.view(torch.float32).to(x.dtype)}


def form_of(folder: Path) -> ExpertForm | None:
    return ExpertForm.FUSED_OUT_IN if read_config(folder).text.moe else None


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Names, shapes, dtypes and every bit."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == x.dtype and found[name].shape == x.shape and torch.equal(bits(found[name]), bits(x))
        for name, x in expected.items()
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    """Zeros of either sign differ, and what is no number equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize])


def groups(names: Iterable[str]) -> dict[str, set[str]]:
    """Which tensors an engine puts together: q, k and v; gate and up, also those of one expert."""
    result: dict[str, set[str]] = {}
    for name in names:
        key = re.sub(r"\b[qkv]_proj\.", "qkv.", re.sub(r"\b(gate|up)_proj\.", "gate_up.", name))
        result.setdefault(key, set()).add(name)
    return result


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKSUMS}


@pytest.mark.parametrize(("kind", "layout"), in_turn(CASES, 4), ids=str)
def test_what_was_loaded_comes_out(pool: Pool, wild: dict[str, Path], kind: str, layout: Layout) -> None:
    source = wild[kind]
    results = pool.run(live_ranks.export_in_all_modes, layout, folder=source, experts=form_of(source))
    expected = weights_of(source)
    config = read_config(source)
    order = list(find(config).table(config, form_of(source)).hf_shapes)
    for size in (TINY, BIG):
        for mode in MODES:
            per_rank = [result[mode, size] for result in results]
            names = [[name for name, _ in rank] for rank in per_rank]
            if mode == "all":
                assert all(mine == order for mine in names)
            elif mode == "first":
                assert names[0] == order
                assert not any(names[1:])
            else:
                assert sorted(name for mine in names for name in mine) == sorted(order)
                assert all(mine == [name for name in order if name in mine] for mine in names)
                assert size == BIG or all(names)
                assert all(any(group <= set(mine) for mine in names) for group in groups(order).values())
            complete = per_rank if mode == "all" else [[pair for mine in per_rank for pair in mine]]
            assert all(same(dict(weights), expected) for weights in complete)
    assert all(not x.requires_grad and x.is_contiguous() for x in dict(results[0]["all", TINY]).values())


FORM_LAYOUTS = [
    Layout(ep=2, world=2),
    Layout(tp=2, sp=True, world=2),
    Layout(tp=2, sp=True, etp=1, ep=2, world=2),
    Layout(tp=2, sp=True, etp=2, ep=2, world=4),
]


FORM_CASES = list(product(ExpertForm, FORM_LAYOUTS))


@pytest.mark.parametrize(("form", "layout"), in_turn(FORM_CASES, 5), ids=str)
def test_every_form_of_experts_is_loaded_and_comes_out(
    pool: Pool, forms: dict[str, Path], form: ExpertForm, layout: Layout
) -> None:
    """In the form of the Hub where none is asked for; together stays, on one rank, what belongs together."""
    own = weights_of(forms[form])
    for result in (results := pool.run(live_ranks.export_forms, layout, folder=forms[form], form=form)):
        assert same(dict(result["default"]), weights_of(forms[ExpertForm.FUSED_IN_OUT]))
        assert same(dict(result["own"]), own)
    shared = [{name for name, _ in result["shared"]} for result in results]
    assert all(shared)
    assert sorted(name for mine in shared for name in mine) == sorted(own)
    assert max(map(len, groups(own).values())) == 3
    assert all(any(group <= mine for mine in shared) for group in groups(own).values())


READERS = [("untied", Layout(world=2)), ("untied", Layout(tp=4, sp=True, world=4)), ("untied", Layout(pp=2, world=2))]
READERS += FORM_CASES


@pytest.mark.parametrize(("kind", "layout"), in_turn(READERS, 5), ids=str)
def test_each_rank_reads_its_own_slices(
    pool: Pool, wild: dict[str, Path], forms: dict[str, Path], kind: str, layout: Layout
) -> None:
    """And what lies between them in the file, where they are columns."""
    source = (wild | forms)[kind]
    whole = sum(x.nbytes for x in weights_of(source).values())
    turned = kind == ExpertForm.FUSED_IN_OUT
    for counts in pool.run(live_ranks.count_bytes_read, layout, folder=source, turned=turned):
        assert counts["read"] == counts["expected"]
        assert counts["held"] <= counts["read"] <= whole
        assert counts["held"] < whole or layout == Layout(world=2)


def test_pretrain_loads_all_virtual_stages(pool: Pool, wild: dict[str, Path]) -> None:
    layout = Layout(pp=2, vpp=2, world=2)
    for result in pool.run(live_ranks.export_provided, layout, folder=wild["tied"]):
        assert same(dict(result), weights_of(wild["tied"]))


def test_tensors_that_are_no_part_of_the_model_are_left_out(pool: Pool, wild: dict[str, Path], tmp_path: Path) -> None:
    expected = weights_of(wild["untied"])
    (tmp_path / "config.json").write_bytes((wild["untied"] / "config.json").read_bytes())
    save_file({**expected, "rotary.frequencies": torch.ones(3)}, tmp_path / "model.safetensors")
    layout = Layout(tp=2, world=2)
    for result in pool.run(live_ranks.export_without, layout, folder=tmp_path, ignore=["rotary.*"]):
        assert same(dict(result), expected)
    with pytest.raises(AssertionError, match=r"extra Hugging Face tensors[\s\S]*rotary.frequencies"):
        pool.run(live_ranks.export_without, layout, folder=tmp_path, ignore=[])


def test_bfloat16(pool: Pool, bfloat16: Path) -> None:
    expected = weights_of(bfloat16)
    assert {x.dtype for x in expected.values()} == {torch.bfloat16}
    for result in pool.run(live_ranks.export_bfloat16, Layout(tp=2, pp=2, world=4), folder=bfloat16):
        assert same(dict(result["half"]), expected)
        assert same(dict(result["converted"]), expected)
        assert same(dict(result["float16"]), {name: x.half() for name, x in expected.items()})


def test_any_bits_in_bfloat16(pool: Pool, bfloat16: Path, tmp_path: Path) -> None:
    def with_wild_halves(name: str, x: torch.Tensor) -> Tensors:
        return {name: torch.arange(x.numel()).to(torch.int16).mul_(-257).view(torch.bfloat16).view(x.shape)}

    folder = rewritten(bfloat16, tmp_path / "hf", with_wild_halves)
    for result in pool.run(live_ranks.export_half, Layout(tp=2, pp=2, world=4), folder=folder):
        assert same(dict(result), weights_of(folder))


def test_no_rank_holds_more_than_two_buckets(pool: Pool, sources: dict[str, Path]) -> None:
    limit = 120_000
    whole = sum(x.nbytes for x in weights_of(sources["untied"]).values())
    assert whole > 5 * limit
    for layout in (Layout(tp=2, pp=2, world=4), Layout(world=2)):
        for peaks in pool.run(live_ranks.measure_peaks, layout, folder=sources["untied"], limit=limit):
            assert limit / 2 < peaks["all"]
            assert max(peaks.values()) <= 2 * limit + 10_000  # what is sent is padded to 16 bytes, tensor by tensor


def test_weights_that_are_not_yet_gathered_are_not_exported_as_they_were(pool: Pool, sources: dict[str, Path]) -> None:
    arguments = {"folder": sources["untied"], "pack": reference.pack([reference.conversation("mixed", 3)], 96)}
    at_once = pool.run(live_ranks.train_and_export, Layout(world=2), overlap=False, **arguments)
    later = pool.run(live_ranks.train_and_export, Layout(world=2), overlap=True, **arguments)
    before = weights_of(sources["untied"])
    assert all(not torch.equal(x, before[name]) for name, x in at_once[0])
    assert all(same(dict(result), dict(at_once[0])) for result in later)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("untied", Layout(tp=2, pp=2, world=4)),
        ("tied", Layout(pp=2, vpp=2, world=2)),
        ("experts", Layout(tp=2, sp=True, pp=2, ep=2, world=8)),
        ("some-experts", Layout()),
    ],
    ids=str,
)
def test_a_saved_folder_is_the_source(pool: Pool, wild: dict[str, Path], kind: str, layout: Layout) -> None:
    source = wild[kind]
    target = source.parent / f"saved-{kind}"
    assert pool.run(live_ranks.save, layout, folder=source, target=target) == [target] * layout.world
    assert files_of(target) == files_of(source)
    assert verify(source, target).equal
    assert verify_checksums(target).equal
    assert not list(target.parent.glob(".*"))


def test_a_saved_folder_is_that_of_an_export(pool: Pool, sources: dict[str, Path], tmp_path: Path) -> None:
    """Also with other options, and from what an import keeps beside the weights."""
    source = sources["experts"]
    imported = import_checkpoint(source, tmp_path / "megatron")
    options: dict[str, Any] = {"dtype": "bfloat16", "experts": "per_expert", "max_shard_size": 50_000}
    export_checkpoint(imported, tmp_path / "exported", **options)
    target = tmp_path / "saved"
    layout = Layout(ep=2, pp=2, world=4)
    pool.run(live_ranks.save, layout, folder=source, like=imported / "hf", target=target, **options)
    assert files_of(target) == files_of(tmp_path / "exported")
    assert len(list(target.glob("*.safetensors"))) > 4


def test_transformers_loads_a_saved_folder(pool: Pool, wild: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    pool.run(live_ranks.save, Layout(tp=2, world=2), folder=wild["tied"], target=tmp_path / "saved")
    loaded, original = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (tmp_path / "saved", wild["tied"])
    )
    assert same(dict(loaded), dict(original))


def test_a_round_trip_through_training_layouts(pool: Pool, sources: dict[str, Path], tmp_path: Path) -> None:
    """Imported, loaded and saved by Megatron, exported: the same bytes."""
    source = sources["experts"]
    imported = import_checkpoint(source, tmp_path / "megatron")
    pool.run(
        ranks.load_run_save,
        Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=8),
        folder=source,
        checkpoint=imported,
        packs=[reference.pack([reference.conversation("mixed", seed=21)], 96)] * 2,
        saved=tmp_path / "saved",
        vocab_size=live_ranks.VOCABULARY,
    )
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "exported", like=source)
    assert files_of(exported) == files_of(source)


EP2, PP2, VPP2 = Layout(ep=2, world=2), Layout(pp=2, world=2), Layout(pp=2, vpp=2, world=2)
NORM = "model.language_model.layers.0.input_layernorm.weight"
TOO_LARGE = r"expected values that float16 holds \(up to 65504\), found 3\.40282e\+38. Use another dtype"
TOO_LARGE_FOR_BF16 = TOO_LARGE.replace("float16", "bfloat16").replace("65504", r"3\.38953e\+38")
LOST = "2 on none:.*linear_fc1.weight.*layers.0.mlp.experts.gate_up_proj.*linear_fc2.weight"


@pytest.fixture(scope="module")
def others(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that differ in one tensor from the untied one."""
    folder = tmp_path_factory.mktemp("others")

    def made(name: str, changed: str, change: Callable[[torch.Tensor], Tensors]) -> Path:
        return rewritten(sources["untied"], folder / name, lambda key, x: change(x) if key == changed else {key: x})

    largest = torch.finfo(torch.float32).max
    too_large = made("large", "lm_head.weight", lambda x: {"lm_head.weight": torch.full_like(x, largest)})
    return {
        "save what no longer fits": made("mixed", NORM, lambda x: {NORM: x.bfloat16()}),
        "save beside what cannot be read": made("more", NORM, lambda x: {NORM: x, "further.weight": x + 1}),
        "load as float16 what is too large": too_large,
        "load as bfloat16 what is too large": too_large,
    }


@pytest.mark.parametrize(
    ("what", "kind", "layout", "said"),
    [
        ("load lost experts", "experts", EP2, "some rank.*" + LOST.replace("2 on", r"\d+ on")),
        ("load a chunk of two", "untied", VPP2, "every weight to be on some rank.*layers.1.*q_proj"),
        ("load where a rank has no folder", "untied", PP2, "absent"),
        ("export lost experts", "experts", EP2, "the live model: .*some rank.*gate_up_proj"),
        ("export a chunk of two", "untied", VPP2, "the live model: .*some rank.*lm_head"),
        ("export differently", "untied", PP2, "rank 1: expected the options of rank 0, .*1000.*1001"),
        ("export to nobody", "untied", PP2, "ranks: expected one of all, first, shared, found 'nobody'"),
        ("export in no bytes", "untied", PP2, "bucket_bytes: expected at least 1, found 0"),
        ("export as integers", "untied", PP2, "dtype: expected one of"),
        ("save to a full disk", "untied", PP2, "expected to write it.*File too large"),
        ("save over something", "untied", PP2, "expected a name that is free"),
        ("save like another model", "untied", PP2, "tie_word_embeddings: expected False, as the model was built"),
        ("save what no longer fits", "untied", PP2, NORM + ": expected float32 values that fit into torch.bfloat16"),
        ("save beside what cannot be read", "untied", PP2, "expected to read further.weight.*Fetch the file again"),
        ("save as float16 what is too large", "untied", PP2, "the live model: .*" + TOO_LARGE),
        ("export as float16 what is too large", "untied", PP2, "the live model: .*" + TOO_LARGE),
        ("load as float16 what is too large", "untied", PP2, "lm_head.weight: " + TOO_LARGE),
        ("export as bfloat16 what is too large", "untied", PP2, "the live model: .*" + TOO_LARGE_FOR_BF16),
        ("load as bfloat16 what is too large", "untied", PP2, "lm_head.weight: " + TOO_LARGE_FOR_BF16),
    ],
    ids=lambda value: value if isinstance(value, str) and value.split()[0] in ("load", "export", "save") else "",
)
def test_every_rank_is_told(
    pool: Pool,
    sources: dict[str, Path],
    others: dict[str, Path],
    tmp_path: Path,
    what: str,
    kind: str,
    layout: Layout,
    said: str,
) -> None:
    target = tmp_path / "absent"
    arguments = {"what": what, "target": target, "others": others.get(what, sources["tied"])}
    for text in pool.run(live_ranks.refusal, layout, folder=sources[kind], **arguments):
        assert re.search(said, text, re.DOTALL), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_every_rank_is_told_of_one_without_memory(pool: Pool, kind: type[Exception]) -> None:
    found = pool.run(live_ranks.out_of_memory, Layout(tp=2, world=2), kind=kind)
    assert found == [f"VLBridgeError: rank 1: {kind.__name__}: expert 7", f"{kind.__name__}: expert 7"]
