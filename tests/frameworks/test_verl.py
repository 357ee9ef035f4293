"""verl's own forward functions on a model that it builds through mbridge: transformers' log-probs and gradients."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlbridge import read_config
from tests import mtp_reference, reference
from tests.frameworks import verl_ranks
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import assert_small, conversations, errors

DENSE = [
    Layout(),
    Layout(tp=2, sp=True, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, sp=True, cp=2, world=4),
]
EXPERTS = [Layout(), Layout(ep=2, world=2)]
FORMS = ["engine-thd", "engine-bshd", "legacy-thd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("experts"), experts={})


def measure(pool: Pool, layout: Layout, folder: Path, form: str, **options: Any) -> dict[str, float]:
    """The errors of the token losses, minus the log-probs, and of each gradient. All ranks run the same batch."""
    found = pool.run(verl_ranks.run, layout, folder=folder, form=form, conversations=conversations(), **options)
    return errors(found, folder, copies=layout.dp * layout.cp)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_log_probs_and_gradients(pool: Pool, folder: Path, layout: Layout, form: str) -> None:
    assert_small(measure(pool, layout, folder, form), folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_log_probs_and_gradients_with_experts(pool: Pool, moe_folder: Path, layout: Layout, form: str) -> None:
    assert_small(measure(pool, layout, moe_folder, form), moe_folder)


def test_the_older_workers_without_packing(pool: Pool, folder: Path) -> None:
    assert_small(measure(pool, Layout(tp=2, sp=True, world=2), folder, "legacy-bshd"), folder)


@pytest.mark.parametrize("layout", [Layout(cp=2, world=2), Layout(pp=2, world=2)], ids=str)
def test_a_loss_that_is_divided_by_the_tokens_at_the_end(pool: Pool, folder: Path, layout: Layout) -> None:
    assert_small(measure(pool, layout, folder, "engine-thd", calculate_per_token_loss=True), folder)


def test_an_mtp_layer_that_is_not_trained(pool: Pool, tmp_path: Path) -> None:
    """Needs this loss; the main loss is that of transformers."""
    folder = mtp_reference.write_mtp_checkpoint(tmp_path)
    found = measure(pool, Layout(), folder, "engine-thd", calculate_per_token_loss=True)
    assert found["token losses"] < tolerance(read_config(folder))
    with pytest.raises(AssertionError, match="calculate_per_token_loss=False"):
        measure(pool, Layout(), folder, "engine-thd")


def test_verl_imports_the_bridges_by_its_environment() -> None:
    code = "import verl, mbridge; print('qwen3_vl' in mbridge.AutoBridge.list_supported_models())"
    environment = {"VERL_USE_EXTERNAL_MODULES": "megatron_vlbridge.integrations.mbridge"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"
