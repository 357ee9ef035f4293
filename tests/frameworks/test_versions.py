"""The frameworks are those of ci/constraints-frameworks.txt, and the functions that the tests call can be imported."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "ci" / "constraints-frameworks.txt"
FUNCTIONS = [
    ("mbridge", "AutoBridge"),
    ("mbridge.core.bridge", "register_model"),
    ("peft", "PeftModel"),
    ("verl.models.mcore.model_forward", "gptmodel_forward_model_engine"),
    ("verl.models.mcore.model_forward", "model_forward_gen"),
    ("verl.utils.megatron_utils", "make_megatron_module"),
]


def _pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    return dict(line.split("==") for line in lines)


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = _pins()
    assert {"mbridge", "peft", "verl"} <= set(pins)
    assert {name: version(name) for name in pins} == pins


@pytest.mark.parametrize(("module", "function"), FUNCTIONS)
def test_the_functions_exist(module: str, function: str) -> None:
    assert callable(getattr(import_module(module), function))
