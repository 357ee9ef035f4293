"""Assertions on errors by short phrases of the message, without regular expressions."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_vlbridge.errors import VLBridgeError


@contextmanager
def rejects(*phrases: str, start: str = "") -> Iterator[pytest.ExceptionInfo[VLBridgeError]]:
    """The block raises a VLBridgeError whose message starts with `start` and contains every phrase.

    Example:
        >>> with rejects("line 3", "unknown key 'images'"):
        ...     raise VLBridgeError("train.jsonl, line 3: unknown key 'images'")
    """
    with pytest.raises(VLBridgeError) as caught:
        yield caught
    message = str(caught.value)
    assert message.startswith(start), message
    for phrase in phrases:
        assert phrase in message, message
