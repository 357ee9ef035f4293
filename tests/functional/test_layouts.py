"""Every kind of input, a padded vocabulary and an unshared tower give transformers' logits, loss and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.functional import matrix
from tests.functional.parity import KINDS, measure
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: reference.write_checkpoint(tmp_path_factory.mktemp(kind), tied=kind == "tied")
        for kind in ("untied", "tied")
    }


def compare(
    pool: Pool, layout: Layout, folder: Path, groups: list[list[reference.Conversation]], **overrides: object
) -> None:
    """Packs of these conversations under `layout` equal transformers, conversation by conversation."""
    measure(pool, layout, folder, groups, **overrides).check()


@pytest.mark.parametrize("ends", ["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_equals_transformers(pool: Pool, folders: dict[str, Path], kind: str, ends: str) -> None:
    compare(
        pool,
        Layout(),
        folders[ends],
        [[reference.conversation(each, seed) for seed, each in enumerate(KINDS[kind], 1)]],
    )


@pytest.mark.parametrize(("ends", "layout"), [("tied", Layout()), ("untied", Layout(tp=4, sp=True, world=4))], ids=str)
def test_padded_vocabulary_changes_nothing(pool: Pool, folders: dict[str, Path], ends: str, layout: Layout) -> None:
    compare(pool, layout, folders[ends], matrix.groups(), vocab_size=192)


def test_longer_turns_of_the_virtual_stages(pool: Pool, folders: dict[str, Path]) -> None:
    layout = Layout(pp=2, vpp=2, world=2)
    compare(pool, layout, folders["untied"], matrix.groups(), microbatch_group_size_per_vp_stage=4)


@pytest.mark.parametrize("layout", [Layout(pp=2, world=2), Layout(pp=4, cp=2, world=8)], ids=str)
def test_stages_forget_what_they_have_sent(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    """As Megatron's pretrain has it; also where deepstack features travel."""
    compare(pool, layout, folders["untied"], matrix.groups(), deallocate_pipeline_outputs=True)


@pytest.mark.parametrize("layout", [Layout(cp=2, world=2), Layout(tp=2, sp=True, cp=2, world=4)], ids=str)
def test_the_tower_on_every_context_parallel_rank(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    compare(pool, layout, folders["untied"], matrix.groups(), balance_vision=False)
