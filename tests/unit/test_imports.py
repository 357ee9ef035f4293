"""Reading configs, rules and layouts and converting checkpoints imports neither Megatron nor transformers."""

import json
import subprocess
import sys

import pytest

PACKAGES = ["config", "families", "weights", "layout", "checkpoint"]
# Imports a package and every module in it; prints which unwanted modules were imported.
CODE = """
import importlib, json, pkgutil, sys
package = importlib.import_module("megatron_vlbridge." + sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
unwanted = [name for name in sys.modules if name.partition(".")[0] in ("megatron", "transformers")]
print(json.dumps({"imported": names, "unwanted": unwanted}))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_neither_megatron_nor_transformers(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, package], capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert found["imported"]
    assert found["unwanted"] == []
