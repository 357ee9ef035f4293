"""Read conversations from a JSON Lines file."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_vlbridge.data.images import is_url
from megatron_vlbridge.data.labels.tools import check_tools
from megatron_vlbridge.data.media import Conversation, Message
from megatron_vlbridge.data.messages import MEDIA_FORM, check_conversation, check_keys, message_name, message_parts
from megatron_vlbridge.data.sources.files.json_lines import JsonLines
from megatron_vlbridge.data.sources.forms.registry import FORMS, Form, convert_record, other_form
from megatron_vlbridge.data.sources.lazy import LazySequence, Records
from megatron_vlbridge.errors import VLBridgeError

# Media placeholders of other formats, such as `<image>`, `<image_1>`, `<|video_2|>`, `<img>`, `<ImageHere>`,
# `<image_placeholder>`, `<IMAGE>`. After a backtick the tag is code, and after a letter one of capitals: `List<VIDEO>`.
MEDIA_TAG = re.compile(
    r"(?<!`)<\|?(image_placeholder|video_placeholder|ImageHere|VideoHere|image|video|audio|img)(?:[ _-]?\d+)?\|?>"
    r"|(?<![`\w])<(IMAGE|VIDEO|AUDIO)>"
)
# A file name between a tag and its closing tag, as in `<video>a.mp4</video>`.
SOURCE = re.compile(r"[^<>]*\.\w+\s*|\s*[^\s<>]*/[^\s<>]*\s*")


class FileConversation(list[Message]):
    """A conversation read from a file, its tools, and its location for error messages, e.g. "train.jsonl, line 7"."""

    def __init__(self, messages: Iterable[Message], location: str, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(messages)
        self.location = location
        self.tools = tools


class FileConversations(LazySequence[FileConversation]):
    """The conversations of a file; one is read, checked and converted when it is requested.

    `records` are those of the file or folder `path` (see `sources.files`), `form` is theirs (see
    `sources.forms.registry`; None detects that of each), without the keys in `ignore`. Paths of media are relative to
    `folder`.

    Raises VLBridgeError: there are no records; when a conversation is read: the record is not one.
    """

    def __init__(
        self,
        records: Records,
        path: Path,
        folder: Path,
        *,
        form: Form | None = FORMS["messages"],
        ignore: Iterable[str] = (),
        literal_tags: bool = False,
    ) -> None:
        if not len(records):
            raise VLBridgeError(f"{records.name}: expected at least one conversation, found none")
        self.records = records
        self.path = path
        self.folder = folder
        self.form = form
        self.ignore = frozenset(ignore)
        self.literal_tags = literal_tags

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int) -> FileConversation:
        """The conversation at an index of at least 0."""
        record = self.records[index]
        location = self.records.location(index)
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if key not in self.ignore}
        try:
            converted, form = convert_record(record, self.form)
            _check_record(converted, form)
            messages = converted["messages"]
            check_conversation(messages)
            tools = [] if converted.get("tools") is None else converted["tools"]
            check_tools(tools)
            if not self.literal_tags:
                _check_tags(messages, form)
        except VLBridgeError as error:
            raise VLBridgeError(f"{location}: {error}{other_form(record, self.form)}") from error

        used: set[str] = set()

        def resolve(source: str) -> str | bytes:
            used.add(source)
            return self.records.media(index, source, self.folder)

        try:
            resolved = [{**message, "content": _resolve_paths(message.get("content"), resolve)} for message in messages]
            self.records.check_used(index, used)
        except VLBridgeError as error:
            raise VLBridgeError(f"{location}: {error}") from error
        return FileConversation(resolved, location, tools)


def read_conversations(
    path: str | Path, *, split: str = "", literal_tags: bool = False, cache: str | Path | None = None
) -> FileConversations:
    """Open a JSONL file (UTF-8) with `{"messages": [...]}` on each line, in the format of `chat.encode_conversation`.

    A line is read when its conversation is requested, so that a file of any size opens at once (for the index and the
    folder `cache` see `sources.files.json_lines.JsonLines`). A dataset without a table of lengths reads all of them
    when it is created. A line may also have `"tools": [...]`, those of the conversation. Paths of
    images and frames are relative to the folder of the file. Blank lines and a byte order mark are skipped. Every
    conversation keeps its file and line, so that errors raised when it is encoded can name them.

    `split`, such as "train" or "validation", is named in errors. With `literal_tags`, `<image>` and similar tags in
    texts are plain text. By default they are rejected: in files converted from other formats they are placeholders for
    media listed elsewhere, and the model would be trained on the tag. A tag after a backtick, and markup between a tag
    and its closing tag (`<video>...</video>`, but not `<video>a.mp4</video>`), are always plain text.

    Raises VLBridgeError: the file is missing or has no conversation; when a line is read: it is not UTF-8, does not
    have this format, has an unknown key or a duplicate key. The error names file and line (from 1), message and part
    (from 0).

    Example line: `{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]}`.
    """
    path = Path(path)
    records = JsonLines(path, name=f"{split} data {path}" if split else str(path), cache=cache)
    return FileConversations(records, path, path.parent, literal_tags=literal_tags)


def _check_record(converted: dict[str, Any], form: Form) -> None:
    """Reject keys that are not those of the form."""
    known = dict.fromkeys(("messages", "tools", *form.keys))
    if form.columns:
        unnamed = "name the column under `columns`, or under `ignore` if it is not to be used"
        check_keys("the line", converted, known, hints={}, otherwise=unnamed)
    else:
        unused = "it would have no effect: name it under `ignore` in the YAML file of --data, or remove it"
        check_keys("the line", converted, known, otherwise=unused)


def _check_tags(messages: Conversation, form: Form) -> None:
    media = f"expected {MEDIA_FORM}"
    if form.columns:
        media = "remove it from the text: the images and videos of a row come before the text of the user"
    for index, message in enumerate(messages):
        text = "".join(part["text"] for part in message_parts(message) if part["type"] == "text")
        text = f"{message.get('reasoning_content') or ''}\n{text}"
        for tag in MEDIA_TAG.finditer(text):
            # `<img>`, a tag that is not closed, or one around a file name.
            name = tag[1] or tag[2]
            end = text.find(f"</{name}>", tag.end())
            if name == "img" or end < 0 or SOURCE.fullmatch(text, tag.end(), end):
                raise VLBridgeError(
                    f"{message_name(messages, index)}: the text contains {tag[0]!r}, which would be trained on as "
                    f"text; {media}; if it is plain text, use --literal-tags or "
                    "read_conversations(..., literal_tags=True)"
                )


def _resolve_paths(content: Any, resolve: Callable[[str], str | bytes]) -> Any:
    """The content with its paths joined to the folder of the media, or replaced by the bytes of the file."""
    if isinstance(content, str | None):
        return content
    return [
        {key: _resolve_path(value, resolve) if key in ("image", "video") else value for key, value in part.items()}
        for part in content
    ]


def _resolve_path(value: Any, resolve: Callable[[str], str | bytes]) -> Any:
    """Resolve a path or a list of paths. Other values stay unchanged: `media` rejects them by name."""
    if isinstance(value, list):
        return [_resolve_path(item, resolve) for item in value]
    return resolve(value) if isinstance(value, str) and not is_url(value) else value
