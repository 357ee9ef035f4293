"""What a table of lengths depends on: the data, the processor, and how conversations are encoded."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_vlbridge.data.conversations import FileConversations
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import LengthTable, Note
from megatron_vlbridge.data.sources.mixture import Mixture

SUFFIX = "lengths"
_EDGE = 1 << 20
_DATA = Path(__file__).parents[1]  # the code that encodes


def table_path(data: str | Path, split: str) -> Path:
    """Where the table of a split of a data file is: beside it.

    Example: `table_path("meta.yaml", "train")` is `Path("meta.yaml.train.lengths")`.
    """
    return Path(f"{data}.{split}.{SUFFIX}")


def fingerprint(conversations: FileConversations | Mixture, measure: Measure) -> dict[str, Any]:
    """The values, in JSON, for which a table of `conversations` is valid.

    Of each file of the sources: name, size, and a digest of the first and the last MB. Of the media the folder,
    relative to that of the source; their files are not read: that an image has changed shows when it is encoded, and is
    an error then.
    """
    parts = conversations.parts if isinstance(conversations, Mixture) else [conversations]
    values = {
        "conversations": len(conversations),
        "sources": [
            {
                "files": [_file(path) for path in part.records.files],
                "media": os.path.relpath(part.folder.resolve(), part.path.parent.resolve()),
                "form": part.form.name if part.form else "auto",
                "columns": part.form.columns if part.form else {},
                "ignore": sorted(part.ignore),
                "literal_tags": part.literal_tags,
            }
            for part in parts
        ],
        **processor_values(measure.processor),
        "vision hidden size": measure.hidden_size,
        "media": asdict(replace(measure.media, url_cache=None)),
        "labels": asdict(measure.labels),
        "transformers": version("transformers"),
        "code": _digest("".join(path.read_text("utf-8") for path in sorted(_DATA.rglob("*.py")))),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return as_json


def processor_values(processor: Any) -> dict[str, Any]:
    """Of a processor of transformers, what tokens and patches depend on."""
    return {
        "image_processor": processor.image_processor.to_dict(),
        "video_processor": processor.video_processor.to_dict(),
        "tokenizer": _digest(processor.tokenizer.backend_tokenizer.to_str()),
        "chat_template": _digest(json.dumps(processor.chat_template)),
    }


def open_table(
    data: str | Path, split: str, conversations: FileConversations | Mixture, measure: Measure
) -> LengthTable | None:
    """The table of a split that `vlbridge data index` wrote beside the data file; None if there is none.

    The text of its first failure says that it is as old as the table.

    Raises VLBridgeError: it was made for other data or settings, or is damaged.
    """
    path = table_path(data, split)
    if not path.exists():
        return None
    table = LengthTable.open(path, fingerprint(conversations, measure))
    if table.first_failed is None:
        return table
    index, text = table.first_failed
    dated = f"{text} (found when {path} was written; after a repair write it again with `vlbridge data index`)"
    return replace(table, first_failed=Note(index, dated))


def _file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return {"name": path.name, "size": size, "digest": digest.hexdigest()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
