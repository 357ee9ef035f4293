"""Reading configs, rules and layouts and converting checkpoints imports neither Megatron nor transformers."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vlbridge

PACKAGES = ["config", "families", "weights", "layout", "checkpoint", "integrations"]
# What runs models on Megatron, or is called by what does.
ON_MEGATRON = ("integrations.chunks", "integrations.auto_bridge.", "integrations.mbridge")
# Imports a package and every module in it; prints which unwanted modules were imported.
CODE = """
import importlib, json, sys
from pathlib import Path
import megatron_vlbridge
root = Path(megatron_vlbridge.__file__).parent
files = [file.relative_to(root.parent).with_suffix("") for file in sorted((root / sys.argv[1]).rglob("*.py"))]
names = [".".join(file.parts).removesuffix(".__init__") for file in files]
names = [name for name in names if not name.removeprefix("megatron_vlbridge.").startswith(tuple(sys.argv[2:]))]
for name in names:
    importlib.import_module(name)
unwanted = [name for name in sys.modules if name.partition(".")[0] in ("megatron", "transformers")]
print(json.dumps({"imported": names, "unwanted": unwanted}))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_neither_megatron_nor_transformers(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, package, *ON_MEGATRON], capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert found["imported"]
    assert found["unwanted"] == []


# What the rooms of `checkpoint` may import of each other, beside the files at its top that import no room.
ROOMS = {
    "stream": {"stream"},
    "hf": {"hf", "stream"},
    "torch_dist": {"torch_dist", "stream"},
    "peft": {"peft", "torch_dist", "hf", "stream", "export_plan"},
    "live": {"live", "peft", "torch_dist", "hf", "stream", "export_plan", "conversion"},
}
LEAVES = {"comparison", "dtypes", "formats", "pipeline_split"}
CHECKPOINT = Path(megatron_vlbridge.__file__).parent / "checkpoint"


def imported_rooms(path: Path) -> set[str]:
    """The parts of `checkpoint` that a file names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition("megatron_vlbridge.checkpoint.")
            found |= {rest.partition(".")[0]} if rest and not package else set()
            assert node.module != "megatron_vlbridge.checkpoint", f"{path}: import the module by its full name"
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_checkpoint_import_only_downwards(room: str) -> None:
    files = list((CHECKPOINT / room).glob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= ROOMS[room] | LEAVES, path
    for leaf in LEAVES:
        assert imported_rooms(CHECKPOINT / f"{leaf}.py") <= LEAVES | {"stream"}, leaf
