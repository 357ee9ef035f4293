"""The checks that need a GPU; `ci/gpu.sh` runs them. Without one nothing is run, and pytest fails."""

from collections.abc import Iterator

import pytest
import torch


def pytest_sessionstart(session: pytest.Session) -> None:
    if not torch.cuda.is_available():
        pytest.exit("no GPU: nothing was run", returncode=3)


@pytest.fixture(scope="session", autouse=True)
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron on one GPU."""
    from tests.gpu.model import one_process

    with one_process("nccl", tmp_path_factory.mktemp("rendezvous") / "store"):
        yield
