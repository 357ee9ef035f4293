"""A family is one folder of `families/`: the rest of the package asks it and names none."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_vlbridge import families, read_config
from megatron_vlbridge.config import LayerKind
from megatron_vlbridge.families.family import combinations

ROOT = Path(__file__).parents[2] / "megatron_vlbridge"
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# The demo makes a model of a family, and integrations verify classes of other libraries.
OWN_ROOMS = ("families/", "demo/", "integrations/")
# The exported name, and the checkpoint in examples of docstrings and `--help`.
ALLOWED = re.compile(r"Qwen3VLModel|(Qwen/)?Qwen3-VL-2B(-Instruct|-megatron)?", re.IGNORECASE)
FILES = sorted(path for path in ROOT.rglob("*.py") if not str(path.relative_to(ROOT)).startswith(OWN_ROOMS))


def code_of(file: Path) -> Iterator[str]:
    """The names and strings of a file, without comments and docstrings (which cite sources)."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return (line for line in ast.unparse(tree).splitlines() if line.strip())


def test_no_code_outside_the_families_names_one() -> None:
    lines = [(file, line) for file in FILES for line in code_of(file)]
    assert len(lines) > 5000
    assert [found for found in lines if "qwen" in ALLOWED.sub("", found[1]).lower()] == []


def test_no_code_outside_the_families_decides_by_the_parts_of_a_model() -> None:
    """It asks for `layer_kinds` or the family instead; `config/` defines the parts."""
    parts = re.compile(r"\btext\.(moe|linear_attention)\b")
    files = [file for file in FILES if file.parent.name != "config"]
    assert [(file, line) for file in files for line in code_of(file) if parts.search(line)] == []


def test_combinations_have_one_of_each_choice() -> None:
    found = combinations(("", "tp", "tp sp"), ("", "pp"))
    names = [(), ("pp",), ("tp",), ("tp", "pp"), ("tp", "sp"), ("tp", "sp", "pp")]
    assert found == {frozenset(one) for one in names}


def test_the_dimensions_of_a_family_are_those_of_its_combinations() -> None:
    for family in families.FAMILIES:
        experts = {"ep", "etp"} if "num_experts" in family.config.text else set()
        assert family.dimensions == {"tp", "sp", "pp", "vpp", "cp"} | experts


def test_the_kinds_of_layers_are_those_of_layer_types(tmp_path: Path) -> None:
    text = read_config(CONFIGS / "Qwen3.5-27B.json").text
    linear, full = LayerKind(linear_attention=True), LayerKind()
    assert text.layer_kinds == (linear, linear, linear, full) * (text.num_layers // 4)
    assert text.mtp_layer_kind == full
    raw = json.loads((CONFIGS / "Qwen3.5-35B-A3B.json").read_text())
    types = ["full_attention", "linear_attention"] * 20
    raw["text_config"] |= {"layer_types": types}
    del raw["text_config"]["full_attention_interval"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = read_config(tmp_path).text
    assert text.layer_kinds == (LayerKind(experts=True), LayerKind(linear_attention=True, experts=True)) * 20
    assert text.mtp_layer_kind == LayerKind(experts=True)


def test_every_model_type_has_one_format() -> None:
    formats = [family.config for family in families.FAMILIES]
    assert len({known.model_type for known in formats}) == len({known.architecture for known in formats}) == 5
