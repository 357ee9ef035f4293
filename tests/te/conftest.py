"""The tests' own process runs no model of Transformer Engine's; its processes do."""

from collections.abc import Iterator

import pytest

from megatron_vlbridge.backends import cpu_runtime
from tests.functional.pool import Pool

# Transformer Engine cannot be imported here: it has no extension.
cpu_runtime.enable()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Workers with the TE backend."""
    workers = Pool(preload="tests.te.preload")
    yield workers
    workers.close()
