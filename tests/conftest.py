"""Every run is the same, whatever the machine, the order of the tests and the worker of xdist that takes them.

`--hypothesis-seed` (`make test-random`) explores instead: other examples, other random values, another order.
"""

import os

# Sums in fp32 depend on how many threads share them out. Read when torch is imported; the tests' processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import random
import zlib
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis.internal.conjecture import providers

SEED_OPTION = "--hypothesis-seed"
# How long an example takes depends on the machine, and a database of examples on earlier runs.
COMMON = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("the-same", derandomize=True, **COMMON)
hypothesis.settings.register_profile("exploring", derandomize=False, **COMMON)


class TorchRandom:
    """Torch's generator as hypothesis wants it, which seeds it before each example."""

    def seed(self, value: int) -> None:
        """Start again from this seed."""
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        """What `setstate` takes."""
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        """Go on where `getstate` was called."""
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(TORCH_RANDOM)

# Hypothesis also tries the constants of whatever modules of the project are imported, which depends on earlier tests.
providers._get_local_constants = lambda: providers._local_constants


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, help="how many examples of each property, in place of the tests' own")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("the-same" if config.getoption(SEED_OPTION) is None else "exploring")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption(SEED_OPTION)
    return None if seed is None else f"seed: {seed} (make test-random SEED={seed} repeats it)"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """When exploring, the tests of a file in any order, and as many examples as are asked for."""
    examples, seed = config.getoption("--examples"), config.getoption(SEED_OPTION)
    if examples is not None:
        for item in items:
            set_examples(item, examples)
    if seed is not None:
        random.Random(seed).shuffle(items)
        items.sort(key=lambda item: item.path)


def set_examples(item: Any, count: int) -> None:
    """In place of the number that the test was written with, which no public setting overrides."""
    test = getattr(item, "obj", None)
    if hypothesis.is_hypothesis_test(test):
        test._hypothesis_internal_use_settings = hypothesis.settings(
            test._hypothesis_internal_use_settings, max_examples=count
        )


def seed_all(name: str, config: pytest.Config) -> None:
    """Seed by name, so that no test depends on what was drawn before it."""
    seed = zlib.crc32(f"{config.getoption(SEED_OPTION)} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    seed_all(f"{request.node.nodeid} {fixturedef.argname} {request.param_index}", request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_all(item.nodeid, item.config)
