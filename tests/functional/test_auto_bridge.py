"""What frameworks do with Megatron-Bridge's `AutoBridge`, done with that of this project: as transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from tests import reference
from tests.cases import later
from tests.closeness import relative_error
from tests.functional import auto_bridge_ranks, call_ranks
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import assert_small, conversations, errors, hidden_states

ONE, TP2_SP, CP2 = Layout(), Layout(tp=2, sp=True, world=2), Layout(cp=2, world=2)
PP2, VPP2, EP2 = Layout(pp=2, world=2), Layout(pp=2, vpp=2, world=2), Layout(ep=2, world=2)
TP2_SP_PP2 = Layout(tp=2, sp=True, pp=2, world=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


CASES = [
    ("verl", TP2_SP_PP2),
    ("miles", VPP2),
    ("nemo_rl", PP2),
    ("sky_rl", TP2_SP),
    ("areal", CP2),
    *(later("verl", x) for x in (ONE, CP2)),
    *(later("miles", x) for x in (ONE, TP2_SP, CP2)),
    *(later("nemo_rl", x) for x in (ONE, TP2_SP_PP2)),
    *(later("sky_rl", x) for x in (ONE, TP2_SP_PP2)),
    *(later("areal", x) for x in (ONE, TP2_SP_PP2)),
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_a_framework_gets_the_model_trains_and_saves_it(
    pool: Pool, folder: Path, tmp_path: Path, name: str, layout: Layout
) -> None:
    run_life(pool, folder, tmp_path / "saved", name, layout)


@pytest.mark.parametrize("name", ["verl", later("sky_rl"), later("nemo_rl")])
def test_a_framework_with_experts(pool: Pool, moe_folder: Path, tmp_path: Path, name: str) -> None:
    run_life(pool, moe_folder, tmp_path / "saved", name, EP2)


@pytest.mark.parametrize(("tied", "layout"), [(True, PP2), later(False, TP2_SP), later(True, ONE)], ids=str)
def test_a_critic_keeps_its_head(pool: Pool, tmp_path: Path, tied: bool, layout: Layout) -> None:
    """The values of transformers' last hidden states, with the weights of a folder whose head may be tied."""
    folder = reference.write_checkpoint(tmp_path / "hf", tied=tied)
    expected = hidden_states(folder) @ call_ranks.value_weight(read_config(folder).text.hidden_size).T
    found = pool.run(auto_bridge_ranks.verl_critic, layout, folder=folder, conversations=conversations())
    values = [x for rank in found for x in rank["values"]]
    assert len(values) == layout.tp
    assert all(relative_error(value, expected) < tolerance(read_config(folder)) for value in values)
    for rank in found:
        (plain, other) = rank["errors"]
        assert "tie_word_embeddings" in plain if tied else "output_layer.weight: expected" in plain
        assert "allowed_mismatched_params: expected ['output_layer.weight']" in other


def run_life(pool: Pool, folder: Path, saved: Path, name: str, layout: Layout) -> None:
    """Losses and gradients as transformers; exported and saved weights bit by bit those of the folder."""
    options = {"folder": folder, "conversations": conversations(), "target": saved}
    found = pool.run(auto_bridge_ranks.live, layout, name=name, **options)
    microbatches = layout.pp if layout.vpp > 1 else 1
    assert_small(errors(found, folder, copies=layout.dp * microbatches), folder)
    expected, names = weights_of(folder), [item.param_name for item in found[0]["exported"]]
    for rank in found:
        assert [item.param_name for item in rank["exported"]] == names
        for item in rank["exported"]:
            assert torch.equal(as_stored(item.weight, expected[item.param_name]), expected[item.param_name])
        assert rank.get("sizes") == found[0].get("sizes")
    assert sorted(names) == sorted(expected)
    assert_same_model(saved, folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def as_stored(found: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Experts that the file has the other way around."""
    return found if found.shape == stored.shape else found.transpose(1, 2)


@torch.no_grad()
def assert_same_model(saved: Path, folder: Path) -> None:
    """transformers loads both with the same logits."""
    inputs = reference.model_inputs(conversations()[-1])
    first, second = (load(x)(**inputs).logits for x in (saved, folder))
    assert torch.equal(first, second)
    assert first.any()


def load(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
