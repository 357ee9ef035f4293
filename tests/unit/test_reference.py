"""What the oracle runs of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, modeling_layers
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from tests import mtp_layer, reference
from tests.closeness import assert_close_in_norm
from tests.mtp_reference import FILE, write_mtp_checkpoint

LINEAR = ["linear", "linear-experts"]
needs_mtp = pytest.mark.skipif(
    not hasattr(modeling_layers, "MtpModel"), reason="this version of transformers has no MTP layer"
)


@pytest.mark.parametrize("kind", LINEAR)
def test_qwen3_5_is_run_token_by_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """The gradients of transformers' chunked rule are not exact enough; afterwards it is there again."""

    def chunked(*_: Any, **__: Any) -> None:
        pytest.fail("the chunked rule is run")

    modules = modeling_qwen3_5, modeling_qwen3_5_moe
    for module in modules:
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", chunked)
    folder = reference.write_checkpoint(tmp_path / kind, **reference.KINDS[kind])
    found = reference.run_transformers(folder, [reference.conversation("image", 1)])
    assert all(gradient.any() for gradient in found.gradients.values())
    assert all(module.torch_chunk_gated_delta_rule is chunked for module in modules)


@needs_mtp
@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_substitute_of_transformers_mtp_layer_is_the_same(tmp_path: Path, kind: str) -> None:
    folder = write_mtp_checkpoint(tmp_path / kind, **reference.KINDS[kind])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    words, hidden = torch.randn(2, 1, 9, 64)
    rotary = model.model.language_model.rotary_emb(hidden, torch.arange(9).expand(3, 1, 9))
    outputs = []
    for layer in (mtp_layer.build(model), mtp_layer.build(model, mtp_layer.SubstituteLayer)):
        mtp_layer.load(layer, load_file(folder / FILE))
        outputs.append(mtp_layer.run(layer, words, hidden, rotary))
    assert type(layer) is mtp_layer.SubstituteLayer
    assert torch.equal(*outputs)


@needs_mtp
@pytest.mark.parametrize("kind", LINEAR)
def test_transformers_reads_the_mtp_layer_and_predicts_the_same(tmp_path: Path, kind: str) -> None:
    """On text, where it gives its layer the positions of one axis."""
    folder = write_mtp_checkpoint(tmp_path / kind, **reference.KINDS[kind])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    config = model.config.text_config
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    theirs = modeling_layers.MtpModel.from_pretrained(model)
    tokens = reference.conversation("text", 1).tokens[None]
    hidden = model.model(input_ids=tokens, use_cache=False)[0][:, :-1]
    positions = torch.arange(hidden.shape[1])[None]
    expected = theirs.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])

    layer = mtp_layer.build(model)
    mtp_layer.load(layer, load_file(folder / FILE))
    words = model.get_input_embeddings()(tokens[:, 1:])
    rotary = model.model.language_model.rotary_emb(hidden, positions.expand(3, 1, -1))
    assert_close_in_norm(mtp_layer.run(layer, words, hidden, rotary), expected, 1e-6)
