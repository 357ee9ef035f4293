"""Packs through models of transformers equal their conversations one by one: logits, loss, every gradient."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vlbridge.integrations import as_transformers_batch
from tests import digits_checkpoint, reference
from tests.closeness import assert_close_in_norm, relative_error
from tests.errors import rejects
from tests.functional import packed_models
from tests.functional.doc_blocks import ROOT, all_blocks
from tests.functional.packed_models import IMPLEMENTATIONS, KINDS, LINEAR, load, pack_of, samples


@pytest.fixture(autouse=True)
def flash_attention() -> Iterator[None]:
    with packed_models.flash_attention():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    options = KINDS | LINEAR
    return {kind: reference.write_checkpoint(root / kind, **options[kind]) for kind in options}


@pytest.mark.parametrize("kind", KINDS)
def test_packs_equal_their_conversations(folders: dict[str, Path], kind: str) -> None:
    packed_models.compare(folders[kind], IMPLEMENTATIONS)


def test_the_kernel_of_flash_attention_gets_the_bounds(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own code around it, which else is replaced with the kernel."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernels = None, packed_models.flash_attn_varlen_func, None, None, None
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention_forward)
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        packed_models.compare(folders[kind], ["flash_attention_2"])


def test_linear_attention_with_kernels_that_take_segments_equals_conversations(folders: dict[str, Path]) -> None:
    words = ["-m", "tests.functional.packed_linear", *(str(folders[kind]) for kind in LINEAR)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_attention_without_kernels_is_refused_as_it_leaks(folders: dict[str, Path], kind: str) -> None:
    model = load(folders[kind], "sdpa")
    two = samples(["image", "text"], 0, model)
    pack = pack_of(two, padding=3, filler=5)
    with rejects("linear attention", "packs of one sample"):
        as_transformers_batch(pack, model)
    of_first = as_transformers_batch(pack_of(two[:1], 3, 5), model)
    size, second = len(two[0][0].tokens), two[1][0]
    with torch.no_grad(), reference.recurrent_delta_rule():
        alone = [model(**reference.model_inputs(c)).logits[0] for c, _ in two]
        assert_close_in_norm(model(**of_first).logits[0, :size], alone[0], 2e-5)
        # The mask, which full attention respects, does not reach linear attention.
        tokens = {"input_ids": torch.cat((two[0][0].tokens, second.tokens))[None]}
        positions = torch.arange(len(second.tokens)).expand(4, 1, -1)
        tokens["position_ids"] = torch.cat((of_first["position_ids"][:, :, :size], positions), dim=2)
        media = {key: of_first[key] for key in ("pixel_values", "image_grid_thw")}
        leaked = model(**tokens, **media, use_cache=False).logits[0, size:]
    assert relative_error(leaked, alone[1]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_positions_alone_leak_with_the_cache_that_transformers_has_by_default(
    folders: dict[str, Path], kind: str
) -> None:
    """Without a mask, transformers finds the segments in `position_ids`, but not with a cache."""
    model = load(folders[kind], "sdpa").eval()
    two = samples(["image", "text"], 0, model)
    batch = as_transformers_batch(pack_of(two, padding=0, filler=5), model)
    size = len(two[0][0].tokens)
    with torch.no_grad():
        alone = model(**reference.model_inputs(two[1][0])).logits[0]
        assert_close_in_norm(model(**batch | {"use_cache": True}).logits[0, size:], alone)
        assert_close_in_norm(model(**batch | {"attention_mask": None}).logits[0, size:], alone)
        leaked = model(**batch | {"use_cache": True, "attention_mask": None}).logits[0, size:]
    assert relative_error(leaked, alone) > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_bf16_nothing_is_nan(folders: dict[str, Path], implementation: str) -> None:
    model = load(folders["qwen3_vl"], implementation).bfloat16()
    batch = as_transformers_batch(pack_of(samples(["mixed", "text"], 0, model), 7, 5), model)
    out = model(**batch)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(x.grad.isfinite().all() for x in model.parameters())
    if implementation == "eager":
        assert batch["attention_mask"].dtype == torch.bfloat16


def test_the_code_on_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [one.text for one in all_blocks() if one.page == "docs/transformers.md"]
    monkeypatch.chdir(digits_checkpoint.write(tmp_path))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(code, names)
    losses = names["losses"]
    assert isinstance(losses, list)
    assert losses[-1] < 0.7 * losses[0]
    assert load(tmp_path / "trained", "sdpa")
