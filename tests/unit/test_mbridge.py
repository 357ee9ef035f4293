"""mbridge is not a dependency: only `integrations.mbridge` imports it."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import megatron_vlbridge
from megatron_vlbridge.errors import VLBridgeError

PACKAGE = Path(megatron_vlbridge.__file__).parent


def test_without_mbridge_the_error_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("megatron_vlbridge.integrations.mbridge")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mbridge", None)
    with pytest.raises(VLBridgeError, match=r"expected the package mbridge, found: .*pip install --no-deps mbridge=="):
        importlib.import_module("megatron_vlbridge.integrations.mbridge")


def test_nothing_else_imports_it() -> None:
    users = {path.parent for path in PACKAGE.rglob("*.py") if any(name == "mbridge" for name in imported(path))}
    assert users == {PACKAGE / "integrations" / "mbridge"}


def imported(path: Path) -> list[str]:
    """The packages that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found += [name.partition(".")[0] for name in names]
    return found
