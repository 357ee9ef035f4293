"""A stand-in for `transformer_engine_torch`, the compiled extension that Transformer Engine's Python calls.

`extension.json` lists what the extension of one version of Transformer Engine holds: enums with their values, classes,
functions. The stand-in has exactly these names. A function does what its reference in `tests.te.references` does; where
there is none, the call fails with the function's name. `CALLS` counts the calls of each function.

For another version of Transformer Engine, where its extension is installed (it is imported; no GPU is used):

    python -m tests.te.extension > tests/te/extension.json

and pin that version in ci/constraints-te.txt. Where arguments have changed, the references fail with a TypeError.
"""

import enum
import importlib
import importlib.machinery
import importlib.metadata
import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "transformer_engine_torch"
TABLE = Path(__file__).with_name("extension.json")
CALLS: Counter[str] = Counter()
# What the functions of the installed stand-in do.
REFERENCES: dict[str, Callable[..., Any]] = {}


def install(references: dict[str, Callable[..., Any]]) -> None:
    """Let `import transformer_engine_torch` give the stand-in."""
    table = json.loads(TABLE.read_text())
    installed = importlib.metadata.version("transformer_engine")
    assert installed == table["transformer_engine"], f"{TABLE.name} is not that of Transformer Engine {installed}"
    unknown = references.keys() - table["functions"]
    assert not unknown, f"references of functions that {TABLE.name} does not list: {unknown}"
    REFERENCES.update(references)
    sys.modules[NAME] = build(table, REFERENCES)


def build(table: dict[str, Any], references: dict[str, Callable[..., Any]]) -> types.ModuleType:
    """The module that a table describes."""
    module = types.ModuleType(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    vars(module).update(
        {name: enum.IntEnum(name, values, module=NAME) for name, values in table["enums"].items()}
        | {name: type(name, (), {"__module__": NAME}) for name in table["classes"]}
        | {name: _function(name, references) for name in table["functions"]}
    )
    return module


def describe(module: types.ModuleType, version: str) -> dict[str, Any]:
    """The table of a module, compiled or built here."""
    public = {name: value for name, value in sorted(vars(module).items()) if not name.startswith("_")}
    enums = {name: value.__members__ for name, value in public.items() if hasattr(value, "__members__")}
    return {
        "transformer_engine": version,
        "enums": {
            name: dict(sorted(((member, int(value)) for member, value in members.items()), key=lambda item: item[1]))
            for name, members in enums.items()
        },
        "classes": [name for name, value in public.items() if isinstance(value, type) and name not in enums],
        "functions": [name for name, value in public.items() if callable(value) and not isinstance(value, type)],
    }


def _function(name: str, references: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        if name not in references:
            raise NotImplementedError(f"{NAME}.{name} was called; tests/te/references has no reference for it")
        CALLS[name] += 1
        return references[name](*args, **kwargs)

    call.__name__ = name
    return call


if __name__ == "__main__":
    importlib.import_module("transformer_engine.pytorch")
    described = describe(sys.modules[NAME], importlib.metadata.version("transformer_engine"))
    print(json.dumps(described, indent=1))
