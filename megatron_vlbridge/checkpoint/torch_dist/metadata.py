"""DCP's `.metadata`, a pickle that is not trusted: few opcodes and classes are accepted, no code is run."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_vlbridge.checkpoint.stream.json_file import is_plain
from megatron_vlbridge.errors import VLBridgeError

_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_SHOWN = 60
_LONGEST = 1000

# Classes of plain fields. An instance is created empty, then its fields are set.
_RECORDS: tuple[type, ...] = (
    *(dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta),
    *(dcp.TensorProperties, dcp.TensorStorageMetadata, _StorageInfo),
    *(planner.SavePlan, planner.TensorWriteData, planner.WriteItem),
)
_SCALARS = (str, int, type(None))
_ENUMS = (dcp._MEM_FORMAT_ENCODING, planner.WriteItemType)
_GLOBALS: dict[tuple[str, str], type] = {
    **{(known.__module__, known.__name__): known for known in (*_RECORDS, *_ENUMS)},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.layout,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # as Python 3.13 calls it
    # Megatron-Core before 0.16 pickled its own subclasses; their state is that of the base classes.
    (_MEGATRON, "MCoreMetadata"): dcp.Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
}


def read_metadata(path: Path) -> dcp.Metadata:
    """The metadata of a checkpoint. The types of its two tables and the names are checked, not what the tables hold.

    The file is not trusted: see `restricted_loads`.

    Raises VLBridgeError, naming the file, where it cannot be read or is anything else than such a pickle.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VLBridgeError(f"{path}: expected a readable file, found: {error}. Copy the folder again.") from error
    try:
        metadata = restricted_loads(content)
    # A broken pickle may raise anything: struct, memory and recursion errors among others.
    except Exception as error:
        found = f"{error}" or type(error).__name__
        raise VLBridgeError(f"{path}: expected DCP's metadata, found: {found}. Do not trust this folder.") from error
    _check(path, metadata)
    return cast(dcp.Metadata, metadata)


def _check(path: Path, metadata: object) -> None:
    entries, places = (getattr(metadata, key, None) for key in ("state_dict_metadata", "storage_data"))
    for what, expected, value in (
        ("the pickle", dcp.Metadata, metadata),
        ("state_dict_metadata", dict, entries),
        ("storage_data", dict, places),
    ):
        if not isinstance(value, expected) or value == {}:
            found = "an empty one" if value == {} else shown(value)
            text = f"expected a {expected.__name__}, found {found}"
            raise VLBridgeError(f"{path}: {what}: {text}. Do not trust this folder.")
    for name in entries or ():
        if not isinstance(name, str) or not is_plain(name) or len(name) > _LONGEST:
            text = f"expected names of at most {_LONGEST} printable characters, found {shown(name)}"
            raise VLBridgeError(f"{path}: state_dict_metadata: {text}. Do not trust this folder.")


def shown(value: object) -> str:
    """A value of a pickle for an error message: a few characters, even if it contains itself."""
    if isinstance(value, tuple) and len(value) <= _SHOWN and all(type(item) is int for item in value):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN])
    if type(value) is int and abs(value) >= 2**64:
        return "a huge number"
    return repr(value) if value is None or isinstance(value, bool | int | float | torch.dtype) else type(value).__name__


def restricted_loads(content: bytes) -> Any:
    """The value of a pickle that holds nothing but DCP's metadata.

    Of what it names only a few classes of plain fields are instantiated, and memory is bounded by the size of the file.
    It may raise any exception for another pickle.
    """
    return _Unpickler(content).load()


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"opcode {code:#04x}, which no checkpoint needs")


class _Unpickler(pickle._Unpickler):
    """The interpreter of pickles in pure Python, with the opcodes of protocol 2 to 5 that DCP's metadata needs.

    `pickle.Unpickler` with a restricted `find_class` is not enough: hashing a deeply nested tuple that is a key
    overflows the C stack and kills the process, BUILD sets attributes on the very classes that `find_class` admits,
    and one memo index allocates gigabytes (`test_a_restricted_find_class_is_not_enough`).
    """

    def __init__(self, content: bytes) -> None:
        stream = io.BytesIO(content)
        super().__init__(stream)
        self.read, self.readline = stream.read, stream.readline

    def load(self) -> Any:
        """The value of the whole pickle. Frames are ignored."""
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        dispatch, read = self.dispatch, self.read
        while code := read(1):
            if code == pickle.STOP:
                return self.stack.pop()
            dispatch[code[0]](self)
        raise EOFError("an end that comes too early")

    def load_frame(self) -> None:
        self.read(8)

    def find_class(self, module: str, name: str, /) -> Any:
        # Not getattr: torch imports some of its modules when they are asked for.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype | torch.layout):
            return vars(torch)[name]
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {shown(f'{module}.{name}')}, which no checkpoint needs")
        return _GLOBALS[module, name]

    def load_reduce(self) -> None:
        """A list, enum or path from its plain parts."""
        arguments, made = self.stack.pop(), self.stack.pop()
        self.append(_make(made, arguments))

    def load_newobj(self) -> None:
        """A record without its fields."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if made not in _RECORDS or arguments != ():
            raise pickle.UnpicklingError(f"a new {_named(made)}, which no checkpoint needs")
        self.append(object.__new__(made))

    def load_build(self) -> None:
        """Set the fields of a record. Anything else that has attributes is shared with the process."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is dcp.TensorProperties and type(state) is tuple and isinstance(state[-2], _ENUMS):
            record.__setstate__(state)
        elif type(record) in _RECORDS and type(state) is dict:
            vars(record).update(state)
        else:
            raise pickle.UnpicklingError(f"attributes for {_named(record)}, which no checkpoint needs")

    def _pop_marked(self) -> list[Any]:
        """The stack after the last mark."""
        items, self.stack = self.stack, self.metastack.pop()
        self.append = self.stack.append
        return items

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self._pop_marked())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(map(_is_key, items[::2])):
            raise pickle.UnpicklingError(f"items for {_named(target)} under keys that no checkpoint needs")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self._pop_marked())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise pickle.UnpicklingError(f"values for {_named(self.stack[-1])}, which no checkpoint needs")
        self.stack[-1].extend(values)

    _PLAIN = (
        *(pickle.PROTO, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
        *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
        *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8),
        *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE),
        *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL),
    )
    dispatch = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN})
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends


def _make(made: object, arguments: object) -> Any:
    """The result of REDUCE."""
    parts = arguments if type(arguments) is tuple else ()
    part = parts[0] if len(parts) == 1 else None
    if made is torch.Size and isinstance(part, tuple | list) and all(type(size) is int for size in part):
        return torch.Size(part)
    if made is OrderedDict and arguments == ():
        return OrderedDict()
    if made is PosixPath and parts and all(type(name) is str for name in parts):
        return PosixPath(*parts)
    if made is torch.layout and type(part) is str:
        return next(found for found in vars(torch).values() if isinstance(found, torch.layout) and str(found) == part)
    if made in _ENUMS and type(part) is int:
        return cast(type[Enum], made)(part)
    raise pickle.UnpicklingError(f"a call of {_named(made)}, which no checkpoint needs")


def _named(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _is_key(value: object) -> bool:
    """Whether a value may be a key: a string, an int, a tuple of these, or the index of a chunk."""
    if type(value) is dcp.MetadataIndex:
        return all(map(_is_short, vars(value).values()))
    return _is_short(value)


def _is_short(value: object) -> bool:
    return type(value) in _SCALARS or (isinstance(value, tuple) and all(type(item) in _SCALARS for item in value))
