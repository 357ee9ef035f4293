"""The stand-in for Transformer Engine's extension has the names of its table, and runs only what has a reference."""

import json

import pytest

from tests.te import extension, references

TABLE = json.loads(extension.TABLE.read_text())


def test_the_stand_in_is_described_by_its_table() -> None:
    module = extension.build(TABLE, references.functions())
    assert extension.describe(module, TABLE["transformer_engine"]) == TABLE


def test_a_call_without_a_reference_fails_with_its_name() -> None:
    with pytest.raises(NotImplementedError, match="fp8_transpose"):
        extension.build(TABLE, {}).fp8_transpose(1, otype=2)
