"""Import and export of checkpoints with experts: bit for bit in every form that they are published in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm, find
from tests.closeness import assert_close_in_norm
from tests.unit.test_convert import (
    EMBEDDING,
    HEAD,
    NORM,
    TEXT,
    TOKENS,
    VISION,
    assert_same_bits,
    assert_side_files_are_the_same,
    bits,
    bits_without_nan,
    normal,
    rewrite,
    save_model,
    tensors,
    training_run,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FORMS = [form.value for form in ExpertForm]
HF_LAYERS = "model.language_model.layers"
SIDES: dict[str, dict] = {"mixed": {"dense": [1]}, "alike": {}, "tied": {"tie": True}}


def tiny_config(inner: int = 12, dense: list[int] | None = None, step: int = 1, tie: bool = False) -> Qwen3VLMoeConfig:
    text = TEXT | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "mlp_only_layers": dense or [],
        "decoder_sparse_step": step,
        "tie_word_embeddings": tie,
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tie, **TOKENS)


def make(folder: Path, form: str = "fused_out_in", *, fill=bits, **sizes) -> Path:
    """What transformers saves, `fused_out_in`, or the same model with its experts turned or taken apart by torch."""
    save_model(Qwen3VLMoeForConditionalGeneration(tiny_config(**sizes)), folder, "40KB", torch.bfloat16, fill)
    (folder / "tokenizer.json").write_bytes(b'{"a":  1}\n')
    if form != "fused_out_in":
        found = tensors(folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        names = [name for name in found if ".mlp.experts." in name]
        for name in names:
            found |= other_form(name, found.pop(name), form)
        shards = [list(found)[start::3] for start in range(3)]
        files = [f"model-{number + 1:05}-of-00003.safetensors" for number in range(3)]
        for file, part in zip(files, shards, strict=True):
            save_file({name: found[name].contiguous() for name in part}, folder / file)
        weight_map = {name: file for file, part in zip(files, shards, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in found.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def other_form(name: str, fused: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """One `[E, out, in]` tensor as others hold it."""
    if form == "fused_in_out":
        return {name: fused.transpose(1, 2)}
    place, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{place}.{expert}.{part}.weight": rows
        for expert, weight in enumerate(fused)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {
        (form, side): make(folder / f"{form}-{side}", form, **sizes) for form in FORMS for side, sizes in SIDES.items()
    }


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("square")
    return {form: make(folder / form, form, inner=16) for form in FORMS}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_is_the_same_folder(form, side, sources, tmp_path):
    source = sources[form, side]
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)


def expert_tensors(form: str, layer: int, expert: int) -> list[str]:
    """The tensors that hold an expert of a layer."""
    place = f"{HF_LAYERS}.{layer}.mlp.experts"
    if form == "per_expert":
        return [f"{place}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
    return [f"{place}.{part}_proj" for part in ("gate_up", "down")]


ROUTERS = [f"{HF_LAYERS}.{layer}.mlp.gate.weight" for layer in range(3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "names",
    [
        lambda form: ROUTERS[1:2],
        lambda form: ROUTERS,
        lambda form: expert_tensors(form, 2, 3),
        lambda form: expert_tensors(form, 1, 0)[:1],
        lambda form: [ROUTERS[0], *expert_tensors(form, 0, 1), NORM.format(1), HEAD],
    ],
    ids=["a-router", "all-routers", "an-expert", "a-gate", "several"],
)
def test_each_tensor_keeps_its_own_dtype(names, form, tmp_path):
    source = make(tmp_path / "hf", form, fill=bits_without_nan)

    def change(found):
        for name in names(form):
            wide = bits_without_nan(found[name].shape, torch.float32)
            assert not torch.equal(wide, wide.bfloat16().float())
            found[name] = wide

    rewrite(source, change)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)
    assert verify(source, tmp_path / "megatron").equal


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_head_that_is_stored_comes_back(form, sources, tmp_path):
    source = Path(shutil.copytree(sources[form, "tied"], tmp_path / "hf"))
    rewrite(source, lambda found: found.update({HEAD: found[EMBEDDING].clone()}))
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert HEAD in tensors(tmp_path / "back")
    assert HEAD not in tensors(sources[form, "tied"])
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.parametrize("side", SIDES)
def test_the_three_forms_of_a_model_are_one_megatron_checkpoint(side, sources, tmp_path):
    contents = []
    for form in FORMS:
        folder = import_checkpoint(sources[form, side], tmp_path / form) / "release"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_is_exported_in_the_form_of_like(form, sources, tmp_path):
    run = training_run(tmp_path / "run", sources["per_expert", "alike"], padding=4)
    export_checkpoint(run, tmp_path / "back", like=sources[form, "alike"])
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources[form, "alike"]))


def test_an_export_can_be_asked_for_another_form(sources, tmp_path):
    import_checkpoint(sources["fused_out_in", "alike"], tmp_path / "megatron")
    for form in FORMS:
        export_checkpoint(tmp_path / "megatron", tmp_path / form, experts=form)
        assert_same_bits(tensors(tmp_path / form), tensors(sources[form, "alike"]))
    export_checkpoint(tmp_path / "megatron", tmp_path / "hub", experts="hub")
    assert_same_bits(tensors(tmp_path / "hub"), tensors(sources["fused_in_out", "alike"]))


EXTRAS = {
    f"{HF_LAYERS}.1.mlp.experts.extra": torch.arange(5),
    f"{HF_LAYERS}.1.mlp.experts.0.bias": torch.arange(3) / 7,
    "steps": torch.arange(6).view(2, 3).half(),
}


@pytest.mark.parametrize("asked", [None, *FORMS])
@pytest.mark.parametrize("form", FORMS)
def test_extra_tensors_of_like_are_carried_into_every_form(form, asked, sources, tmp_path):
    like = Path(shutil.copytree(sources[form, "alike"], tmp_path / "like"))
    rewrite(like, lambda found: found.update(EXTRAS))
    run = training_run(tmp_path / "run", sources["per_expert", "alike"])
    export_checkpoint(run, tmp_path / "back", like=like, experts=asked)
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources[asked or form, "alike"]) | EXTRAS)


@pytest.mark.parametrize("asked", [None, *FORMS])
@pytest.mark.parametrize("form", FORMS)
def test_the_plan_says_where_the_form_is_not_the_hubs(form, asked, sources, tmp_path):
    import_checkpoint(sources[form, "alike"], tmp_path / "megatron")
    summary = plan_export(tmp_path / "megatron", tmp_path / "back", choices=ExportChoices(experts=asked)).summary()
    notes = [note for note in summary["notes"] if note.startswith("experts ")]
    written = asked or form
    expected = f"experts are written as {written}; the Hub's form of them is fused_in_out: --experts fused_in_out"
    assert notes == ([] if written == "fused_in_out" else [expected])


@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_without_a_source_the_export_has_the_form_of_the_hub(unstacked, sources, tmp_path):
    run = training_run(tmp_path / "run", sources["fused_out_in", "alike"], unstacked=unstacked)
    (tmp_path / "like").mkdir()
    shutil.copy(sources["fused_out_in", "alike"] / "config.json", tmp_path / "like")
    export_checkpoint(run, tmp_path / "back", like=tmp_path / "like")
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources["fused_in_out", "alike"]))


def test_layers_of_two_kinds_are_stored_one_by_one_under_megatrons_names(sources, tmp_path):
    folder = import_checkpoint(sources["fused_out_in", "mixed"], tmp_path / "megatron")
    names = FileSystemReader(folder / "release").read_metadata().state_dict_metadata
    layers = "language_model.decoder.layers"
    assert f"{layers}.0.mlp.experts.experts.linear_fc1.weight" in names
    assert f"{layers}.0.mlp.experts.experts.linear_fc1._extra_state/shard_3_4" in names
    assert f"{layers}.1.mlp.linear_fc1.layer_norm_weight" in names
    assert f"{layers}.1.mlp.linear_fc1._extra_state/shard_0_1" in names
    assert f"{layers}.2.pre_mlp_layernorm.weight" in names
    assert f"{layers}.1.mlp.router.weight" not in names
    assert not any(name.startswith((f"{layers}.mlp", f"{layers}.self")) for name in names)


def test_experts_are_stored_one_by_one_in_a_stack_of_layers_and_experts(sources, tmp_path):
    folder = import_checkpoint(sources["fused_in_out", "alike"], tmp_path / "megatron")
    names = FileSystemReader(folder / "release").read_metadata().state_dict_metadata
    name = "language_model.decoder.layers.mlp.experts.experts.linear_fc1"
    entry = names[f"{name}.weight"]
    assert entry.size == (3, 4, 24, 32)
    assert {tuple(chunk.sizes) for chunk in entry.chunks} == {(1, 1, 24, 32)}
    assert {n for n in names if n.startswith(f"{name}._extra")} == {
        f"{name}._extra_state/shard_{layer}.{expert}_3.4" for layer in range(3) for expert in range(4)
    }


def test_every_second_layer_has_experts_where_the_config_says_so(tmp_path):
    source = make(tmp_path / "hf", step=2)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    experts = {name.split(".")[3] for name in tensors(source) if ".mlp.experts." in name}
    assert experts == {"1"}


@pytest.mark.parametrize("form", ["fused_in_out", "fused_out_in"])
def test_transformers_loads_the_export(form, sources, tmp_path):
    import_checkpoint(sources["per_expert", "alike"], tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", experts=form)
    expected = Qwen3VLMoeForConditionalGeneration.from_pretrained(sources["fused_out_in", "alike"]).state_dict()
    found = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("form", ["fused_in_out", "fused_out_in"])
def test_an_orientation_that_cannot_be_seen_is_refused_unless_said(form, square, tmp_path):
    source = square[form]
    with pytest.raises(VLBridgeError, match="orientation cannot be seen"):
        import_checkpoint(source, tmp_path / "megatron")
    assert not any(tmp_path.iterdir())
    import_checkpoint(source, tmp_path / "megatron", experts=form)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    import_checkpoint(square["per_expert"], tmp_path / "single")
    export_checkpoint(tmp_path / "single", tmp_path / "same", experts=form)
    assert_same_bits(tensors(tmp_path / "same"), tensors(source))
    with pytest.raises(VLBridgeError, match="orientation cannot be seen"):
        export_checkpoint(tmp_path / "single", tmp_path / "other", like=source)
    export_checkpoint(tmp_path / "single", tmp_path / "other", like=source, experts=form)
    assert_same_bits(tensors(tmp_path / "other"), tensors(source))


@pytest.mark.parametrize("form", ["fused_in_out", "fused_out_in"])
def test_an_orientation_that_cannot_be_seen_is_compared_as_it_is_said(form, square, tmp_path):
    import_checkpoint(square["per_expert"], tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match="orientation cannot be seen"):
        verify(square[form], tmp_path / "megatron")
    assert verify(square[form], tmp_path / "megatron", experts=form).equal
    assert verify(square["per_expert"], square[form], experts=form).equal
    other = next(name for name in ("fused_in_out", "fused_out_in") if name != form)
    with pytest.raises(VLBridgeError, match="down_proj: expected"):  # it is not square
        verify(square[form], tmp_path / "megatron", experts=other)


def test_the_hubs_orientation_computes_what_transformers_does(tmp_path):
    """The published tensors are multiplied from the right, as the classes of transformers 4.57 do: `x @ w`."""
    source = make(tmp_path / "hf", "fused_out_in", fill=normal)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    import_checkpoint(make(tmp_path / "single", "per_expert", fill=normal), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", experts="fused_in_out")
    found = {name: tensor.float() for name, tensor in tensors(tmp_path / "back").items()}
    place = f"{HF_LAYERS}.1.mlp"
    gate_up, down = found[f"{place}.experts.gate_up_proj"], found[f"{place}.experts.down_proj"]
    assert (gate_up.shape, down.shape) == ((4, 32, 24), (4, 12, 32))
    x = torch.randn(5, 32)
    weights, chosen = (x @ found[f"{place}.gate.weight"].T).softmax(-1).topk(2)
    gate, up = torch.einsum("th,ehf->tef", x, gate_up).chunk(2, dim=-1)
    each = torch.einsum("tef,efh->teh", torch.nn.functional.silu(gate) * up, down)
    mine = torch.stack([each[token, chosen[token]] for token in range(5)])
    expected = ((weights / weights.sum(-1, keepdim=True))[..., None] * mine).sum(1)
    result = model.model.language_model.layers[1].mlp(x[None])[0]
    assert_close_in_norm(result, expected, 1e-6)


@pytest.mark.parametrize("asked", ["fused_in_out", "per_expert"])
def test_a_form_that_the_tensors_do_not_have_is_refused(asked, sources, tmp_path):
    with pytest.raises(VLBridgeError, match=r"mlp\.experts"):
        import_checkpoint(sources["fused_out_in", "alike"], tmp_path / "megatron", experts=asked)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "value"), [("norm_topk_prob", False), ("mlp_only_layers", [1]), ("num_experts", 5)])
def test_a_config_that_means_another_model_is_refused(key, value, sources, tmp_path):
    source = Path(shutil.copytree(sources["fused_out_in", "alike"], tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"].pop("num_local_experts" if key == "num_experts" else key, None)
    config["text_config"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(VLBridgeError, match="norm_topk_prob" if key == "norm_topk_prob" else r"mlp\.experts"):
        import_checkpoint(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_the_rules_agree_with_transformers_on_names_and_shapes(sources):
    """In the form that transformers holds in memory."""
    for side, sizes in SIDES.items():
        model = Qwen3VLMoeForConditionalGeneration(tiny_config(**sizes))
        config = read_config(sources["fused_out_in", side])
        table = find(config).table(config, ExpertForm.FUSED_OUT_IN)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = {HEAD: shapes[HEAD]} if side == "tied" else {}
        assert table.hf_shapes | tied == shapes
