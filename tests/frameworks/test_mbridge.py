"""Bridges that mbridge's `AutoBridge` gives for models of this project."""

from pathlib import Path

import pytest
import torch
from mbridge import AutoBridge
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.stream.checksums import verify_checksums
from megatron_vlbridge.families import FAMILIES, find
from megatron_vlbridge.integrations.mbridge import VLBridge
from tests import reference
from tests.closeness import relative_error
from tests.frameworks import mbridge_ranks, verl_ranks
from tests.functional.call_ranks import value_weight
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import conversations, errors, hidden_states
from tests.functional.test_docs import PYTHON, block

ONE, TP2_SP = Layout(), Layout(tp=2, sp=True, world=2)
CP2, PP2, EP2 = Layout(cp=2, world=2), Layout(pp=2, world=2), Layout(ep=2, world=2)


def test_every_model_type_has_a_bridge() -> None:
    from mbridge.core.bridge import _MODEL_REGISTRY

    types = {family.config.model_type for family in FAMILIES}
    assert types <= set(AutoBridge.list_supported_models())
    assert all(_MODEL_REGISTRY[name] is VLBridge for name in types)


@pytest.mark.parametrize("layout", [ONE, TP2_SP, Layout(pp=2, vpp=2, world=2)], ids=str)
def test_the_config_has_what_mbridge_sets(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    """All fields but those of the checkpoint are those of mbridge's bridge for a Qwen3 in the same layout."""
    folder = reference.write_checkpoint(tmp_path / "model")
    decided = find(read_config(folder)).language_fields(read_config(folder)).keys()
    functions = {"init_method", "output_layer_init_method", "embedding_init_method"}
    for found in pool.run(mbridge_ranks.configs, layout, folder=folder):
        different = {name for name, (ours, theirs) in found.items() if ours != theirs}
        assert different <= decided | functions
        assert found["sequence_parallel"][0] == (layout.tp > 1)


@pytest.mark.parametrize(
    ("kind", "layout", "tied"),
    [
        ("dense", ONE, False),
        ("dense", TP2_SP, True),
        ("dense", PP2, True),
        ("dense", Layout(tp=2, sp=True, cp=2, world=4), False),
        ("experts", EP2, False),
        ("linear-experts", Layout(pp=2, vpp=2, world=2), False),
    ],
    ids=str,
)
def test_weights_out(pool: Pool, tmp_path: Path, kind: str, layout: Layout, tied: bool) -> None:
    """Exported ones are the folder's bit by bit, with the same names in the same order on all ranks; and saved ones.

    Experts are exported as the Hub has them; transformers has saved those of Qwen3-VL-MoE transposed.
    """
    folder = reference.write_checkpoint(tmp_path / "model", tied=tied, **reference.KINDS[kind])
    (folder / "chat_template.jinja").write_text("the checkpoint's")
    target, prepared = tmp_path / "new", layout.world == 2
    found = pool.run(mbridge_ranks.out, layout, folder=folder, target=target, prepared=prepared)
    expected = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    assert all(rank["names"] == found[0]["names"] for rank in found)
    assert found[0]["tensors"].keys() == expected.keys()
    for name, tensor in expected.items():
        hub = tensor.transpose(1, 2) if kind == "experts" and ".experts." in name else tensor
        assert torch.equal(found[0]["tensors"][name], hub), name

    model, saved = (AutoModelForImageTextToText.from_pretrained(x, dtype=torch.float32) for x in (folder, target))
    for (name, old), (_, new) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(new, 2 * old), name
    assert read_config(target) == read_config(folder)
    template = (target / "chat_template.jinja").read_text()
    assert template == ("verl's" if prepared else "the checkpoint's")
    assert prepared or verify_checksums(target).equal
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new"}


def test_the_lines_of_the_page(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path / "model")
    (weights,) = pool.run(mbridge_ranks.documented, ONE, folder=folder, code=block(PYTHON["mbridge"]).text)
    for source in (folder, tmp_path / "model-trained"):
        expected = {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("layout", "form", "tied"),
    [
        (ONE, "engine-thd", True),
        (ONE, "legacy-bshd", False),
        (TP2_SP, "engine-bshd", False),
        (CP2, "engine-thd", False),
        (PP2, "legacy-thd", True),
    ],
    ids=str,
)
def test_a_critic(pool: Pool, tmp_path: Path, layout: Layout, form: str, tied: bool) -> None:
    """verl's value head gives the values of transformers' hidden states, and keeps its weight at a load."""
    folder = reference.write_checkpoint(tmp_path, tied=tied)
    found = pool.run(mbridge_ranks.critic, layout, folder=folder, form=form, conversations=conversations())
    expected = hidden_states(folder) @ value_weight(read_config(folder).text.hidden_size)[0]
    values = [rank["values"] for rank in found if rank["values"]]
    assert values
    for rows in values:
        assert relative_error(torch.cat(rows), expected) < tolerance(read_config(folder))
    for rank in found:
        assert all("a critic: expected the head of a language model" in error for error in rank["errors"])
    assert not (folder / "critic").exists()


@pytest.mark.parametrize("layout", [EP2, PP2], ids=str)
def test_frozen_routers(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    folder = reference.write_checkpoint(tmp_path, experts={})
    names = [name for rank in pool.run(mbridge_ranks.frozen, layout, folder=folder) for name in rank]
    assert len(names) == 4 * layout.dp
    assert all(name.endswith("mlp.router.weight") for name in names)
    options = {"form": "engine-thd", "conversations": conversations(), "freeze_router": True}
    worst = errors(pool.run(verl_ranks.run, layout, folder=folder, **options), folder, copies=layout.dp)
    large = {name for name, error in worst.items() if not error < tolerance(read_config(folder))}
    assert large == {f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in range(4)}


def test_extra_args_are_kept_until_the_config_is_made_anew(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    (found,) = pool.run(mbridge_ranks.extra_args, ONE, folder=folder)
    last = ("selective", AttnBackend.fused, True)
    assert found == [("selective", AttnBackend.auto, True), last, last]


def test_how_a_model_is_wrapped(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    first, second = pool.run(mbridge_ranks.wrapped, Layout(world=2), folder=folder)
    assert first["classes"] == ["DistributedDataParallel", "Float16Module", "Qwen3VLModel"]
    assert first["plain"] == ["Float16Module", "Qwen3VLModel"]
    assert first["ddp"] == [(True, True), (False, True)]
    assert first["dtype"] == {torch.bfloat16}
    assert not torch.equal(first["broadcast False"], second["broadcast False"])
    assert torch.equal(first["broadcast True"], second["broadcast True"])
    weights = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    assert torch.equal(first["loaded"], weights["model.language_model.embed_tokens.weight"].bfloat16())


ERRORS = {
    "fsdp": "get_model: use_torch_fsdp2=True is not supported. Use DDP with the distributed optimizer.",
    "encoder and decoder": "model_type=",
    "optimizer_config": "Give ddp_config.",
    "unknown keyword": "use_magic=False is not supported",
    "defaults": "accepted",
    "bf16 of an fp32 bridge": "get_model: bf16: expected False, as in bridge.config, found True",
    "unknown ddp_config": "ddp_config: expected names that it has, found magic",
    "fsdp in ddp_config": "ddp_config: use_megatron_fsdp is not supported",
    "unknown extra arg": "set_extra_args: expected names that it has, found magic",
    "unknown backend": "attention_backend: expected names that it has, found magic",
    "flash": "verified: <AttnBackend.auto",
    "another model": "hidden_size=32, verified: 64, the checkpoint's",
    "another layout": "context_parallel_size=2, of the process groups 1",
    "routing replay": "moe_enable_routing_replay=True",
    "padded vocabulary": "expected a divisor of the vocabulary, 128, found 48",
    "divided vocabulary": "accepted",
    "other states": "parallel_states: expected Megatron's own",
    "own states": "accepted",
    "private method": "_weight_to_hf_format: mbridge's conversion of single parameters is not offered",
    "weights there": "expected a folder without weights, found model-00001",
    "like its config": "accepted",
    "like nothing": "expected a checkpoint that it is to be like, found none",
    "vlm_step": "calculate_per_token_loss=False, verified: True",
    "config": "hf_config: vision_end_token_id: expected another id than image_token_id, found 9",
}


def test_what_is_not_offered_is_rejected(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    (found,) = pool.run(mbridge_ranks.rejected, ONE, folder=folder)
    assert found.keys() == ERRORS.keys()
    for name, words in ERRORS.items():
        assert words in found[name], name
    assert not hasattr(VLBridge, "_weight_to_hf_format")


@pytest.mark.parametrize("layout", [ONE, TP2_SP], ids=str)
def test_adapters_are_exported_merged(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    folder = reference.write_checkpoint(tmp_path / "model")
    for found in pool.run(mbridge_ranks.adapted, layout, folder=folder):
        expected, pairs = dict(found["base"]), found["adapters"]
        for name in [name for name in pairs if name.endswith("lora_A.weight")]:
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            expected[weight] = expected[weight] + 3 * pairs[name.replace("lora_A", "lora_B")] @ pairs[name]
        assert len(pairs) == 2 * read_config(folder).text.num_layers
        assert found["merged"].keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in found["merged"].items())
