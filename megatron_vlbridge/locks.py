"""One process at a time writes a target."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError


@contextmanager
def locked(target: Path, work: Path) -> Iterator[None]:
    """Lock the folder `work`, which is made, while `target` is written. The folder may be removed before the end.

    The kernel releases the lock when the process ends, however it ends.

    Raises VLBridgeError: another process has the lock.

    Example: `with locked(Path("a.lengths"), Path("a.lengths.parts")): ...`.
    """
    while True:
        work.mkdir(exist_ok=True)
        try:
            handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run that held it has just ended
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(work / "lock", handle):
                yield
                return
        except BlockingIOError as error:
            text = f"{target}: expected to write it alone, found another run that writes it ({work}). Wait for it."
            raise VLBridgeError(text) from error
        finally:
            os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
