"""The tables of docs/data.md list every form, every key of images and videos, and every option that concerns data."""

import argparse
import json
import re
from pathlib import Path

import yaml

from megatron_vlbridge.data.messages import PART_KEYS
from megatron_vlbridge.data.sources.forms.registry import NAMES, convert_record, find_form
from megatron_vlbridge.data.sources.meta import KEYS
from megatron_vlbridge.training.launch.data import add_data_arguments
from megatron_vlbridge.training.launch.labels import add_label_arguments
from megatron_vlbridge.training.launch.media import add_media_arguments
from megatron_vlbridge.training.launch.packing import add_packing_arguments

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def rows(first: str) -> list[list[str]]:
    """The cells of the rows of a table, which is found by its header."""
    [table] = [table for table in PAGE.split("\n\n") if table.startswith(first)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_each_form_has_a_line_that_is_read() -> None:
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Who?"}]
    found = []
    for _, name, line in rows("| your data | `form` |"):
        form = name.strip("`")
        texts = re.findall("`([^`]*)`", line)
        columns = yaml.safe_load(texts[1])["columns"] if form == "columns" else None
        user, assistant = convert_record(json.loads(texts[0]), find_form(form, columns))[0]["messages"]
        assert assistant == {"role": "assistant", "content": "A cat."}, form
        assert user["content"] == (question[:1] if form == "openai" else question), form
        if form != "columns":
            assert convert_record(json.loads(texts[0]), None)[1].name == form
        found.append(form)
    assert found == [name for name in NAMES if name != "auto"]


def test_each_key_of_images_and_videos_is_listed() -> None:
    listed = {kind: set[str]() for kind in ("image", "video")}
    for keys, kinds, _ in rows("| key | of | meaning |"):
        for kind, names in listed.items():
            if f"{kind}s" in kinds or f"{kind} files" in kinds:
                names |= set(re.findall("`([a-z_]+)`", keys))
    assert listed == {kind: set(PART_KEYS[kind]) - {kind} for kind in listed}


def test_each_option_of_data_and_key_of_a_source_is_listed() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_data_arguments, add_media_arguments, add_label_arguments, add_packing_arguments):
        add(parser)
    cells = [row[0] for row in rows("| here | meaning | Automodel |")]
    assert {len(row) for row in rows("| here | meaning | Automodel |")} == {5}
    options = {option for cell in cells for option in re.findall(r"--[a-z-]+", cell)}
    others = {"--seq-length", "--pack-multiple-of", "--workers", "--data-cache-path", "--seed"}
    assert options == set(parser._option_string_actions) | others
    assert set(KEYS) <= {name for cell in cells for name in re.findall(r"`([a-z]+)`", cell)}
