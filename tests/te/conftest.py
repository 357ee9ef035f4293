"""The tests' own process runs no model of Transformer Engine's; its processes do."""

import sys
from collections.abc import Iterator

import pytest

from megatron_vlbridge.backends import cpu_runtime
from tests.te.host import Hosts
from tests.te.pool import Pool

# Transformer Engine cannot be imported here: it has no extension.
cpu_runtime.enable()
# Transformers runs its rule of linear attention in torch; to import this takes long.
sys.modules["fla"] = None  # type: ignore[assignment]

# The longest first, so that the processes of pytest-xdist, each of which takes whole files, end together.
ORDER = {f"test_{name}": place for place, name in enumerate(("training", "gpu_checks", "parity", "checkpoints"))}
HOSTS = pytest.StashKey[Hosts]()


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist share the hosts.
    if not hasattr(config, "workerinput"):
        config.stash[HOSTS] = Hosts()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.get(item.path.stem, len(ORDER)))


def pytest_unconfigure(config: pytest.Config) -> None:
    if HOSTS in config.stash:
        config.stash[HOSTS].close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Workers with the TE backend."""
    workers = Pool("te")
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def cpu_pool() -> Iterator[Pool]:
    """Workers with the CPU backend."""
    workers = Pool("cpu")
    yield workers
    workers.close()
