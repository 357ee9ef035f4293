from collections.abc import Iterator

import pytest

from tests.functional.pool import Pool

# The files that take longest come first, so that the processes of pytest-xdist, each of which takes whole files, end
# together.
LONGEST = ("test_training", "test_docs", "test_demo", "test_matrix", "test_hub", "test_published", "test_own_script")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()
