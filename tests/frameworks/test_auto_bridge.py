"""verl's own code makes models through this project's `AutoBridge`: they train and answer as transformers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlbridge import read_config
from tests import reference
from tests.closeness import relative_error
from tests.frameworks import auto_bridge_ranks
from tests.functional import call_ranks
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import assert_small, conversations, errors, hidden_states

LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, world=2),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


def write(where: Path, kind: str, tied: bool = False) -> Path:
    return reference.write_checkpoint(where / kind, tied=tied, **reference.KINDS[kind])


@pytest.mark.parametrize(("kind", "layout"), [*(("dense", x) for x in LAYOUTS), ("experts", Layout(ep=2, world=2))])
def test_a_model_of_verl_trains_as_transformers(pool: Pool, tmp_path: Path, kind: str, layout: Layout) -> None:
    folder = write(tmp_path, kind)
    options = {"folder": folder, "conversations": conversations(), "critic": False}
    found = pool.run(auto_bridge_ranks.verl, layout, **options)
    assert_small(errors(found, folder, copies=layout.dp), folder)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True, world=2), Layout(pp=2, world=2)], ids=str)
def test_a_critic_of_verl_gives_values(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    """With a folder whose head is tied to its embedding; the head is verl's."""
    folder = write(tmp_path, "dense", tied=True)
    options = {"folder": folder, "conversations": conversations(), "critic": True}
    found = pool.run(auto_bridge_ranks.verl, layout, **options)
    expected = hidden_states(folder) @ call_ranks.value_weight(read_config(folder).text.hidden_size).T
    values = [x for rank in found for x in rank["values"]]
    assert len(values) == layout.tp
    assert all(relative_error(value, expected) < tolerance(read_config(folder)) for value in values)
    assert all(rank["head"] == ["language_model.output_layer.weight"] for rank in found if rank["values"])
