"""A bridge of Megatron-Bridge's names with adapters of `add_lora`, and what it rejects."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from tests import lora_reference, reference
from tests.cases import later
from tests.closeness import relative_error
from tests.functional import auto_bridge_lora_ranks
from tests.functional.doc_blocks import all_blocks
from tests.functional.pool import Layout, Pool
from tests.functional.test_auto_bridge import as_stored, weights_of
from tests.functional.test_lora_weights import assert_same, in_peft, values_of

ONE, TP2, VPP2 = Layout(), Layout(tp=2, world=2), Layout(pp=2, vpp=2, world=2)
TP2_EP2 = Layout(tp=2, sp=True, ep=2, etp=1, world=2)
TP2_ETP1 = Layout(tp=2, sp=True, etp=1, world=2)
TP4_SP = Layout(tp=4, sp=True, world=4)
LORA: dict[str, Any] = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA}
# The order of sums in B A depends on the shapes that the ranks have.
ROUNDING = 1e-7
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("lora")
    return {kind: reference.write_checkpoint(made / kind, **options) for kind, options in reference.KINDS.items()}


CASES = [
    ("dense", VPP2, None),
    ("experts", TP2_EP2, None),
    ("dense", ONE, ["q_proj", "down_proj"]),
    *(later(*case) for case in (("linear", TP4_SP, None), ("linear-experts", TP2_ETP1, None), ("experts", ONE, None))),
]


@pytest.mark.parametrize(("kind", "layout", "targets"), CASES, ids=str)
def test_adapters_are_exported_merged_and_apart(
    pool: Pool, folders: dict[str, Path], tmp_path: Path, kind: str, layout: Layout, targets: list[str] | None
) -> None:
    folder, pairs = folders[kind], lora_reference.random_pairs(folders[kind], targets)
    lora = {**LORA, "targets": targets, "values": values_of(pairs)}
    results = pool.run(auto_bridge_lora_ranks.adapted, layout, folder=folder, lora=lora, target=tmp_path)
    expected = weights_of(lora_reference.write_merged(folder, tmp_path / "expected", pairs))
    adapters = {name.removeprefix("base_model.model."): x for name, x in in_peft(pairs).items()}
    for result in results:
        assert result["trained"]
        merged = dict(result["merged"])
        assert_same({name: as_stored(x, expected[name]) for name, x in result["base"]}, weights_of(folder))
        assert_merged(merged, expected, pairs)
        assert_same(dict(result["adapters"]), adapters)
        assert [name for name, _ in result["of tasks"]] == result["names"]
        assert_same(dict(result["of tasks"]), {name: merged[name] for name in result["names"]})
    assert_same(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), in_peft(pairs))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the base"
    assert_merged(weights_of(tmp_path / "merged"), expected, pairs)


def assert_merged(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], pairs: lora_reference.Pairs
) -> None:
    """`W + scaling * B A` up to the order of its sums, and all weights without an adapter as they are."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        mine = as_stored(found[name], x)
        assert relative_error(mine, x) < ROUNDING if name in pairs else torch.equal(mine, x), name


def test_a_merge_has_the_values_that_ddp_has_not_gathered_yet(pool: Pool, folders: dict[str, Path]) -> None:
    pack = reference.pack([reference.conversation("text", 1)], 32)
    options = {"folder": folders["dense"], "pack": pack}
    at_once, later_on = (
        pool.run(auto_bridge_lora_ranks.trained, Layout(world=2), overlap=overlap, **options)
        for overlap in (False, True)
    )
    for rank, expected in zip(later_on, at_once, strict=True):
        assert_same(rank, expected)
    changed = {name for name, x in weights_of(folders["dense"]).items() if not torch.equal(at_once[0][name], x)}
    assert {name.split(".")[-2] for name in changed} == {"q_proj"}


@pytest.mark.parametrize("kind", ["experts", later("dense")])
def test_a_merge_is_rounded_as_by_peft(pool: Pool, folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """In bf16: B A in fp32, of experts rounded, and the sum rounded."""
    folder, pairs = folders[kind], lora_reference.random_pairs(folders[kind])
    lora = {**LORA, "values": values_of(pairs)}
    (found,) = pool.run(auto_bridge_lora_ranks.adapted, ONE, folder=folder, lora=lora, target=tmp_path, bf16=True)
    expected = {name: x.bfloat16() for name, x in weights_of(folder).items()}
    for name, (a, b) in pairs.items():
        delta = b.bfloat16().float() @ a.bfloat16().float() * lora_reference.SCALING
        if delta.dim() == 3:
            delta = delta.bfloat16().float()
            delta = delta if delta.shape == expected[name].shape else delta.transpose(1, 2)
        expected[name] = (expected[name].float() + delta).bfloat16()
    assert_same({name: as_stored(x, expected[name]) for name, x in found["merged"]}, expected)
    assert_same(weights_of(tmp_path / "merged"), expected)


def test_options_of_a_provider_and_of_exports(pool: Pool, folders: dict[str, Path], tmp_path: Path) -> None:
    other = lora_reference.write_merged(folders["dense"], tmp_path / "other", {})
    path = next(path for path in other.glob("*.safetensors") if EMBEDDING in load_file(path))
    save_file({name: -x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    arguments = {"folder": folders["dense"], "other": other, "work": tmp_path}
    expected = {name: x.bfloat16() for name, x in weights_of(other).items()}
    size = float(weights_of(other)[EMBEDDING].abs().sum())
    for rank, found in enumerate(pool.run(auto_bridge_lora_ranks.options, Layout(world=2), **arguments)):
        names, sizes = zip(*found["events"], strict=True)
        assert names == ("first", "second", "third", "fourth", "apart", "broadcast")
        loaded = [relative_error(found_size, size) < 1e-3 for found_size in sizes]
        assert loaded == [False, True, True, True, False, False]
        assert found["dtypes"] == [torch.bfloat16] * 3
        assert found["parallel_output"] is False
        assert found["fp32"] == {torch.float32}
        assert found["half"] is True
        assert_same(found["own"], expected)
        assert found["kept"] is torch.bfloat16
        assert (found["apart"], found["broadcast"]) == ([1.0 + rank], [1.0])
    for saved in ("saved", "weights"):
        assert_same(weights_of(tmp_path / saved), {name: x.float() for name, x in expected.items()})


def test_settings_that_are_not_offered_are_rejected(pool: Pool, folders: dict[str, Path]) -> None:
    for found in pool.run(auto_bridge_lora_ranks.settings_refusals, TP2, folder=folders["dense"]):
        words = [
            ["calculate_per_token_loss=False, verified: True"],
            ["accepted"],
            ["AttributeError", "'no_such_setting'", "Correct it or leave it out"],
            ["AttributeError", "'transformer_layer_spec'", "cannot be replaced"],
            ["attention_backend=<AttnBackend.flash", "verified: <AttnBackend.auto"],
            ["attention_backend: expected one of flash, fused", "found 'fast'"],
            ["num_layers=2", "the checkpoint's"],
            ["provide_distributed_model: use_megatron_fsdp=True is not offered"],
            ["provide_distributed_model: mixed_precision_wrapper="],
            ["expected a ddp_config, found none"],
            ["expected one of fp16 and bf16, found both"],
            ["AttributeError", "'push_to_hub'", "Save with save_hf_pretrained"],
            ["AttributeError", "hf_pretrained", "'state'"],
            ["from_hf_pretrained: rope_scaling=2 is not offered"],
        ]
        for text, expected in zip(found, words, strict=True):
            assert all(word in text for word in expected), text


def test_calls_that_would_give_other_weights_are_rejected_on_all_ranks(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora = {**LORA, "values": values_of(lora_reference.random_pairs(folders["dense"]))}
    options = {"folder": folders["dense"], "lora": lora, "target": tmp_path / "taken"}
    for found in pool.run(auto_bridge_lora_ranks.weight_refusals, TP2, **options):
        words = [
            ["expected its param_weight as get_conversion_tasks made it", "copy the tensor into it first"],
            ["expected its param_weight as get_conversion_tasks made it"],
            ["expected tasks of get_conversion_tasks, found str"],
            ["names: expected tensors of the model, and of those that belong together all"],
            ["rank 1: expected the options of rank 0"],
            ["a bridge of from_hf_config has no weights"],
            ["a bridge of from_hf_config has no weights"],
            ["accepted"],
            ["expected a folder without weights, found model.safetensors"],
            ["expected a folder without weights, found model.safetensors"],
            ["found none in the first", "Call add_lora"],
            ["expected adapters of add_lora, found language_model.", "of another library"],
            ["peft_config.alpha: expected 6", "found 7"],
        ]
        for text, expected in zip(found, words, strict=True):
            assert all(word in text for word in expected), text
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["model.safetensors"]


def test_the_tasks_of_a_part_of_the_chunks_are_rejected_on_all_ranks(pool: Pool, folders: dict[str, Path]) -> None:
    for found in pool.run(auto_bridge_lora_ranks.incomplete, Layout(pp=2, vpp=2, world=2), folder=folders["dense"]):
        assert "expected every weight on one of the ranks, found model.language_model." in found


def test_a_provider_makes_the_process_groups_and_seeds_them(pool: Pool, folders: dict[str, Path]) -> None:
    for found in pool.run(auto_bridge_lora_ranks.own_groups, TP2, folder=folders["dense"]):
        assert "expected Megatron's process groups, found none" in found["missing"]
        assert found["size"] == 2
        first, second = found["weights"]
        assert_same(second, first)
        assert first.keys() == weights_of(folders["dense"]).keys()


def test_a_sum_that_is_too_large_is_rejected_on_all_ranks(pool: Pool, folders: dict[str, Path]) -> None:
    for found in pool.run(auto_bridge_lora_ranks.overflow, TP2, folder=folders["dense"]):
        for text in found:
            assert "layers.0.self_attention.linear_qkv_lora: expected a sum of weight and adapter that" in text
            assert "found inf" in text


def test_the_code_of_the_page_runs(pool: Pool, folders: dict[str, Path], tmp_path: Path) -> None:
    code = [block.text for block in all_blocks() if block.page == "docs/auto-bridge.md"]
    options = {"folder": folders["dense"], "code": code, "work": tmp_path}
    for found in pool.run(auto_bridge_lora_ranks.documented, Layout(tp=2, sp=True, world=2), **options):
        assert {name.split(".")[-2] for name in found["targets"]} == {"q_proj", "v_proj"}
        assert (found["config"].tensor_model_parallel_size, found["config"].sequence_parallel) == (2, True)
    assert_same(weights_of(tmp_path / "trained"), weights_of(folders["dense"]))


def test_folders_are_converted_as_by_the_command(pool: Pool, folders: dict[str, Path], tmp_path: Path) -> None:
    from megatron_vlbridge.integrations import AutoBridge

    AutoBridge.import_ckpt(folders["dense"], tmp_path / "megatron", trust_remote_code=True)
    like = shutil.copytree(folders["dense"], tmp_path / "like")
    (like / "README.md").write_text("of another source")
    bridge = AutoBridge.from_hf_pretrained(folders["dense"])
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf", source_path=like)
    assert (tmp_path / "hf" / "README.md").read_text() == "of another source"
    export_checkpoint(import_checkpoint(folders["dense"], tmp_path / "other"), tmp_path / "expected")
    assert_same(weights_of(tmp_path / "hf"), weights_of(tmp_path / "expected"))
