"""What the package relies on inside other packages has not changed: see tests/unit/seams.py.

python -m tests.unit.test_seams    prints the digests of the installed sources
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.seam_digests import DIGESTS
from tests.unit.seams import SEAMS

PACKAGE = Path(__file__).parents[2] / "megatron_vlbridge"
FOREIGN = ("megatron", "torch", "transformers", "argparse")


def find(source: str, folder: Path | None = None) -> ast.AST:
    """The definition in the file that has it; nothing is imported, so no replacement can hide it.

    `folder`: where the packages are, if not where Python finds them.
    """
    module, _, path = source.partition(":")
    root, *rest = module.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None
    assert spec.origin is not None or spec.submodule_search_locations
    places = list(spec.submodule_search_locations or [str(Path(spec.origin or "").with_suffix(""))])
    file = Path(places[0] if folder is None else folder / root, *rest)
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for name in path.split("."):
        found = [x for x in definitions(node) if name in names_of(x)]
        assert found, f"{source}: {file} has no {name}"
        node = found[-1]
    return node


def definitions(node: ast.AST) -> Iterator[ast.AST]:
    """What is defined in a module or class, also under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from definitions(child)
        else:
            yield child


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "") or ""]


def digest(node: ast.AST) -> str:
    """Of a syntax tree without docstrings, comments and layout; the same under every version of Python."""
    return hashlib.sha256(repr(_plain(node)).encode()).hexdigest()[:12]


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return type(node).__name__, [(name, _plain(x)) for name, x in fields.items() if x is not None and x != []]


ROWS = [(source, user, reason) for user, rows in SEAMS.items() for source, reason in rows.items()]


@pytest.mark.parametrize(("source", "user", "reason"), ROWS, ids=[source for source, _, _ in ROWS])
def test_the_source_is_one_that_was_read(source: str, user: str, reason: str) -> None:
    found = digest(find(source))
    assert reason.startswith("replaced") or found in DIGESTS[source], (
        f"{source} has changed: {found} is none of {DIGESTS[source]}. megatron_vlbridge/{user} relies on this: "
        f"{reason}. Read the new source; tests/unit/seams.py says how an upgrade is done"
    )


def test_the_digests_are_those_of_the_table() -> None:
    assert list(DIGESTS) == [source for source, _, reason in ROWS if not reason.startswith("replaced")]
    assert [user for user in SEAMS if not (PACKAGE / user).is_file()] == []


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names of other packages that a file imports or reads, and attributes of their modules that it sets."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Import):
            roots = [alias for alias in node.names if alias.name.split(".")[0] in FOREIGN]
            modules |= {alias.asname or alias.name.split(".")[0] for alias in roots}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(root := _root(node), ast.Name) and root.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private or isinstance(node.ctx, ast.Store):
                yield node.attr


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_uses_are_in_the_table(file: Path) -> None:
    listed = {source.rpartition(":")[2].rpartition(".")[2] for source, _, _ in ROWS}
    assert set(private_uses(ast.parse(file.read_text(encoding="utf-8")))) <= listed


def test_private_uses_are_found() -> None:
    code = "from torch.x import _a, b\nimport torch\nimport os\ntorch.c.d = torch.e\ntorch.f._g(self._h, os._exit)\n"
    assert sorted(private_uses(ast.parse(code))) == ["_a", "_g", "d"]


def test_the_digest_sees_code_and_nothing_else() -> None:
    first = ast.parse('def f(x):\n    """Doc."""\n    return x + 1  # why\n')
    assert digest(first) == digest(ast.parse("def f(x):\n\n    return (x + 1)\n"))
    assert digest(first) != digest(ast.parse("def f(x):\n    return x + 2\n"))


if __name__ == "__main__":
    for name, _, _ in ROWS:
        print(name, digest(find(name)))
