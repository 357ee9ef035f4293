"""Make every run deterministic, for any machine, order of the tests and number of xdist workers.

With `--hypothesis-seed` (`make test-random`), examples, random values and the order depend on the seed instead.
"""

import os

# Sums in fp32 depend on the number of threads. Read when torch is imported, and inherited by child processes.
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
# The time of an example depends on the machine, and a database of examples on earlier runs.
COMMON = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("deterministic", derandomize=True, **COMMON)
hypothesis.settings.register_profile("random", derandomize=False, **COMMON)


class TorchRandom:
    """Torch's generator with the interface that hypothesis requires; it seeds the generator before each example."""

    def seed(self, value: int) -> None:
        """As in `random.seed`."""
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        """As in `random.getstate`."""
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        """As in `random.setstate`."""
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(TORCH_RANDOM)

# Hypothesis also tries constants of the imported modules of the project, which depend on earlier tests.
providers._get_local_constants = lambda: providers._local_constants


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--examples", type=int, help="number of examples of each property test, instead of the one in its settings"
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("deterministic" if config.getoption(SEED_OPTION) is None else "random")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption(SEED_OPTION)
    return None if seed is None else f"seed: {seed} (make test-random SEED={seed} repeats it)"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Apply `--examples`; with a seed, shuffle the tests of each file."""
    examples, seed = config.getoption("--examples"), config.getoption(SEED_OPTION)
    if examples is not None:
        for item in items:
            set_examples(item, examples)
    if seed is not None:
        random.Random(seed).shuffle(items)
        items.sort(key=lambda item: item.path)


def set_examples(item: Any, count: int) -> None:
    """Override the number of examples in the settings of the test, for which there is no public API."""
    test = getattr(item, "obj", None)
    if hypothesis.is_hypothesis_test(test):
        test._hypothesis_internal_use_settings = hypothesis.settings(
            test._hypothesis_internal_use_settings, max_examples=count
        )


def seed_all(name: str, config: pytest.Config) -> None:
    """Seed by name, so that no test depends on values drawn earlier."""
    seed = zlib.crc32(f"{config.getoption(SEED_OPTION)} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  used by libraries
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    seed_all(f"{request.node.nodeid} {fixturedef.argname} {request.param_index}", request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_all(item.nodeid, item.config)
