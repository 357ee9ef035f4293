"""Merged checkpoints: `W + scaling * B A` in the dtype of each weight, all else as in the base, streamed."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlbridge import cli, import_checkpoint, merge_adapter, read_config
from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.peft.adapter import base_shapes
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig
from megatron_vlbridge.checkpoint.peft.merge import plan_merge
from megatron_vlbridge.checkpoint.peft.writer import write_adapter
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.stream.engine import Options
from megatron_vlbridge.errors import VLBridgeError
from tests import fp8_checkpoint, mtp_reference, reference
from tests.unit.test_convert import rewrite, tensors

ALPHA, RANK = 5.0, 3
Q = "model.language_model.layers.0.self_attn.q_proj.weight"
Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return reference.write_checkpoint(tmp_path / "base", layers=2)


def random_pairs(folder: Path, rank: int = RANK) -> Pairs:
    """A pair for every weight that can have one."""
    torch.manual_seed(5)
    return {
        name: (torch.randn(*lead, rank, columns), torch.randn(*lead, rows, rank))
        for name, (*lead, rows, columns) in base_shapes(read_config(folder)).items()
    }


def write(folder: Path, pairs: Pairs) -> Path:
    write_adapter(folder, "base", AdapterConfig(next(iter(pairs.values()))[0].shape[-2], ALPHA), pairs)
    return folder


def merged_by_hand(base: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """With the product and the sum in float32, each rounded as the weight's kind is."""
    found = dict(base)
    for name, (a, b) in pairs.items():
        product = b @ a * (ALPHA / a.shape[-2])
        if name in found:
            turned = product if product.shape == base[name].shape else product.transpose(1, 2)
            added = turned.to(base[name].dtype).float() if product.ndim == 3 else turned
            found[name] = (base[name].float() + added).to(base[name].dtype)
            continue
        layer = name.rpartition(".")[0]
        for expert, values in enumerate(product):
            halves = zip(("gate_proj", "up_proj"), values.chunk(2), strict=True)
            for half, rows in halves if name.endswith("gate_up_proj") else [("down_proj", values)]:
                key = f"{layer}.{expert}.{half}.weight"
                found[key] = base[key] + rows.to(base[key].dtype)
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x), name


def convert(dtype: torch.dtype, keep: str = " ") -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found |= {name: x if re.search(keep, name) else x.to(dtype) for name, x in found.items()}

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["fused_in_out", "fused_out_in", "per_expert"])
def test_all_weights_of_all_forms_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype
) -> None:
    """Also those of the MTP layer, which peft does not load, and in many parts and small blocks."""
    monkeypatch.setattr(hf_writer, "PART_BYTES", 5_000)
    base = mtp_reference.write_mtp_checkpoint(tmp_path / "base", layers=2, experts={}, mtp_experts=form)
    turn(base, form)
    rewrite(base, convert(dtype))
    pairs = random_pairs(base)
    assert {"lm_head.weight", "mtp.fc.weight", "mtp.layers.0.mlp.experts.down_proj"} < pairs.keys()
    found = merge_adapter(base, write(tmp_path / "adapter", pairs), tmp_path / "merged", options=Options(workers=2))
    assert_same(tensors(found), merged_by_hand(tensors(base), pairs))
    again = merge_adapter(import_checkpoint(base, tmp_path / "imported"), tmp_path / "adapter", tmp_path / "again")
    assert files_of(again) == files_of(found)
    assert {name: x for name, x in files_of(base).items() if ".safetensors" not in name} == {
        name: x for name, x in files_of(found).items() if ".safetensors" not in name
    }


def turn(folder: Path, form: str) -> None:
    """Give the experts of the decoder another form than that in which transformers has saved them."""

    def change(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if re.search(r"language_model.*experts\.gate_up_proj", name)]:
            down = name.replace("gate_up_proj", "down_proj")
            assert found[name].shape[1:] == (48, 64)
            if form == "fused_in_out":
                found |= {key: found[key].transpose(1, 2) for key in (name, down)}
                continue
            for expert, (gate_up, last) in enumerate(zip(found.pop(name), found.pop(down), strict=True)):
                for half, x in zip(("gate", "up", "down"), (*gate_up.chunk(2), last), strict=True):
                    found[f"{name.rpartition('.')[0]}.{expert}.{half}_proj.weight"] = x

    if form != "fused_out_in":
        rewrite(folder, change)


def test_the_form_of_experts_by_option(tmp_path: Path) -> None:
    """Square ones, whose form cannot be seen; and another form than that of a Megatron base."""
    base = reference.write_checkpoint(tmp_path / "base", layers=2, experts={"moe_intermediate_size": 32})
    pairs = random_pairs(base)
    adapter = write(tmp_path / "adapter", pairs)
    with pytest.raises(VLBridgeError, match="--experts fused_out_in"):
        merge_adapter(base, adapter, tmp_path / "merged")
    merge_adapter(base, adapter, tmp_path / "merged", experts="fused_out_in")
    fused = tensors(tmp_path / "merged")
    assert_same(fused, merged_by_hand(tensors(base), pairs))
    with pytest.raises(VLBridgeError, match=r"down_proj: expected \[4, 32, 64\], found \[4, 64, 32\]"):
        merge_adapter(base, adapter, tmp_path / "other", experts="fused_in_out")
    imported = import_checkpoint(base, tmp_path / "imported", experts="fused_out_in")
    single = tensors(merge_adapter(imported, adapter, tmp_path / "single", experts="per_expert"))
    layer = "model.language_model.layers.0.mlp.experts"
    for expert, gate_up in enumerate(fused[f"{layer}.gate_up_proj"]):
        assert torch.equal(single[f"{layer}.{expert}.up_proj.weight"], gate_up[32:])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKSUMS}


def test_a_base_of_two_dtypes_and_more_tensors_keeps_both(tmp_path: Path, base: Path) -> None:
    rewrite(base, convert(torch.bfloat16, keep=r"layers\.0\.|norm"))
    rewrite(base, lambda found: found.update({"another": torch.arange(3.0)}))
    pairs = random_pairs(base)
    plan = plan_merge(base, write(tmp_path / "adapter", pairs), tmp_path / "merged")
    assert "copied unchanged, as not part of the model: 1 tensor: another" in plan.notes
    assert_same(tensors(plan.run()), merged_by_hand(tensors(base), pairs))


def test_fp8_weights_are_merged_as_the_bfloat16_values_that_they_stand_for(tmp_path: Path, base: Path) -> None:
    rewrite(base, convert(torch.bfloat16))
    pairs, expected = random_pairs(base), fp8_checkpoint.quantise_folder(base)
    found = merge_adapter(base, write(tmp_path / "adapter", pairs), tmp_path / "merged")
    assert_same(tensors(found), merged_by_hand(expected, pairs))
    assert "quantization_config" not in json.loads((found / "config.json").read_text())


@pytest.mark.parametrize(
    ("dtype", "change", "words"),
    [
        (torch.float16, lambda a: a * 1e5, "that float16 holds, found -?inf"),
        (torch.float32, lambda a: a * 1e38 * 1e38, "that float32 holds"),
        (torch.bfloat16, lambda a: a * float("nan"), "that bfloat16 holds, found nan"),
    ],
    ids=["overflow", "infinite", "nan"],
)
def test_values_that_are_not_finite_are_rejected(
    tmp_path: Path, base: Path, dtype: torch.dtype, change: Callable[[Tensor], Tensor], words: str
) -> None:
    rewrite(base, convert(dtype))
    pairs = random_pairs(base)
    a, b = pairs[Q]
    write(tmp_path / "adapter", pairs | {Q: (change(a), b)})
    with pytest.raises(VLBridgeError, match=f"{re.escape(Q)}: expected merged values {words}"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_rejected_before_a_byte_is_written(tmp_path: Path, base: Path) -> None:
    other = reference.write_checkpoint(tmp_path / "other", layers=3)
    for folder in (other, reference.write_checkpoint(tmp_path / "moe", layers=2, experts={})):
        adapter = write(tmp_path / f"of-{folder.name}", random_pairs(folder))
        with pytest.raises(VLBridgeError, match=r"of a module of the base, found model\.language_model\.layers"):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "other", "moe", "of-other", "of-moe"}


@pytest.mark.parametrize(
    ("weight", "shape"),
    [
        ("model.language_model.embed_tokens.weight", (128, 64)),
        ("model.visual.pos_embed.weight", (36, 32)),
        ("model.language_model.norm.weight", (64, 1)),
        ("model.visual.patch_embed.proj.weight", (32, 3)),
    ],
)
def test_weights_that_peft_does_not_adapt_in_this_form_are_rejected(
    tmp_path: Path, base: Path, weight: str, shape: tuple[int, int]
) -> None:
    pair = torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK)
    with pytest.raises(VLBridgeError, match=f"found {re.escape(weight)} .adapters of embeddings, convolutions"):
        merge_adapter(base, write(tmp_path / "adapter", {weight: pair}), tmp_path / "merged")


def test_an_interrupted_merge_continues_and_another_adapter_does_not(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_writer, "PART_BYTES", 20_000)
    pairs = random_pairs(base)
    adapter, target = write(tmp_path / "adapter", pairs), tmp_path / "merged"
    seen: list[Any] = []

    def report(progress: Any) -> None:
        seen.append(progress)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, target, options=Options(workers=2, report=report))
    second = write(tmp_path / "second", {name: (a, 2 * b) for name, (a, b) in pairs.items()})
    with pytest.raises(VLBridgeError, match=r"weights\.adapter_model"):
        merge_adapter(base, second, target, resume=True)
    seen.clear()
    merge_adapter(base, adapter, target, resume=True, options=Options(report=seen.append))
    assert seen[-1].resumed > 0
    assert_same(tensors(target), merged_by_hand(tensors(base), pairs))
    seen.clear()
    merge_adapter(base, adapter, target, resume=True, options=Options(report=seen.append))
    assert not seen
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("5.0", "6.0"))
    with pytest.raises(VLBridgeError, match=r"found that of another: weights\.adapter_config"):
        merge_adapter(base, adapter, target, resume=True)


def test_the_memory_of_a_merge_counts_the_product(tmp_path: Path, base: Path) -> None:
    pairs = random_pairs(base, rank=1000)
    plan = plan_merge(base, write(tmp_path / "adapter", pairs), tmp_path / "merged")
    sizes = {name: 4 * sum(half.numel() for half in pair) for name, pair in pairs.items()}
    largest = max(x.nbytes for x in tensors(base).values())
    assert plan.writer.block_bytes > largest + max(sizes.values())


def test_the_command(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_pairs(base)
    adapter, merged = write(tmp_path / "adapter", pairs), tmp_path / "merged"
    assert cli.main(["merge", str(base), str(adapter), str(merged), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kind"], plan["bytes"]) == ("merge", sum(x.nbytes for x in tensors(base).values()))
    assert not merged.exists()
    assert cli.main(["merge", str(base), str(adapter), str(merged)]) == 0
    assert capsys.readouterr().out == f"{merged}\n"
    assert_same(tensors(merged), merged_by_hand(tensors(base), pairs))
    assert (merged / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert cli.main(["verify", str(merged)]) == 0
    assert cli.main(["merge", str(base), str(adapter), str(tmp_path / "x"), "--like", str(base)]) == 2
    assert "like: expected none" in capsys.readouterr().err
    assert cli.main(["merge", str(base), str(base), str(tmp_path / "x")]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    (adapter / "latest_checkpointed_iteration.txt").write_text("1")
    assert cli.main(["merge", str(base), str(adapter), str(tmp_path / "x")]) == 1
    assert "found a Megatron checkpoint. Write its adapters" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
