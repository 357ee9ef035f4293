"""Images and videos at URLs, fetched once into a folder."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
)

from megatron_vlbridge.errors import VLBridgeError

HTTP = re.compile("https?://", re.IGNORECASE)
RESERVED = "%/:=&?~#+!$,;'@()*[]"
TIMEOUT_S = 60  # without any data
LIMIT = 4 * 2**30  # bytes
ATTEMPTS, WAIT_S = 3, 1.0
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which it is tried again
CHUNK = 2**20


def is_http(source: object) -> bool:
    """Whether a source is a URL that `fetch` takes."""
    return isinstance(source, str) and HTTP.match(source) is not None


def fetch(url: str, folder: str | Path, is_wanted: Callable[[Path], bool] = Path.exists) -> str:
    """The path of the file at an http or https URL, which is fetched if it is not in the folder yet.

    Several processes that need the same file wait for the one that fetches it. A file is there only when it is
    complete and `is_wanted`; it is never fetched again, also if it changes on the server.

    Raises VLBridgeError: the server does not answer, or with an error, three times; the file has another length than
    the server says, or more than 4 GiB, or is not wanted; the folder cannot be written.
    Example: `fetch("https://example.com/a.jpg", "cache")` is "cache/" and a hash with the suffix ".jpg".
    """
    target = Path(folder) / _name(url)
    if target.exists():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                _fetch(url, target, is_wanted)
    except OSError as error:
        raise VLBridgeError(f"{url}: cannot be written to {folder}: {error}") from error
    return str(target)


def _name(url: str) -> str:
    suffix = PurePosixPath(re.split("[?#]", url)[0]).suffix
    return hashlib.sha256(url.encode()).hexdigest() + (suffix if suffix[1:].isalnum() and len(suffix) < 8 else "")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Of all processes one at a time; the file is left there, as another one may wait for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, target: Path, is_wanted: Callable[[Path], bool]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # Other characters than those of a URL, such as spaces, are sent as it demands.
            with _opener().open(quote(url, safe=RESERVED), timeout=TIMEOUT_S) as answer:
                _copy(url, answer, target, is_wanted)
            return
        except VLBridgeError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            final = isinstance(error, HTTPError) and error.code not in BUSY
            if final or attempt == ATTEMPTS:
                raise VLBridgeError(f"{url}: cannot be fetched: {error}") from error
        time.sleep(WAIT_S * attempt)


def _copy(url: str, answer: Any, target: Path, is_wanted: Callable[[Path], bool]) -> None:
    """Write the body to the target, which appears when it is complete."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            size = _write(url, answer, file)
            file.flush()
            os.fsync(file.fileno())
        expected = answer.headers.get("Content-Length")
        if expected is not None and int(expected) != size:
            raise HTTPException(f"{size} bytes came, but the server said {expected}")
        if not is_wanted(partial):
            with partial.open("rb") as file:
                start = file.read(80)
            raise VLBridgeError(
                f"{url}: expected an image or a video, found {size} bytes that begin with {start!r}; fetch it by hand "
                "and write its path"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write(url: str, answer: Any, file: IO[bytes]) -> int:
    size = 0
    while chunk := answer.read(CHUNK):
        size += len(chunk)
        if size > LIMIT:
            raise VLBridgeError(f"{url}: more than {LIMIT} bytes, fetch it by hand and write its path")
        file.write(chunk)
    return size


def _opener() -> OpenerDirector:
    """Without the handlers of files, FTP and `data:`, to which a server could redirect."""
    opener = OpenerDirector()
    handlers = (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPDefaultErrorHandler,
        HTTPRedirectHandler,
        HTTPErrorProcessor,
    )
    for handler in handlers:
        opener.add_handler(handler())
    return opener
