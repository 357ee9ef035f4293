"""The torch_dist folder and Megatron's own loader and saver, at other layouts than it was written with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from tests import mtp_reference, reference
from tests.cases import in_turn
from tests.functional import ranks
from tests.functional.pool import Layout, Pool

LAYOUTS = [Layout(tp=tp, pp=pp, sp=tp > 1, world=tp * pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))]
EXPERT_LAYOUTS = [Layout(), Layout(ep=4, world=4), Layout(ep=2, pp=2, world=4), Layout(tp=2, sp=True, ep=2, world=4)]
VIRTUAL = Layout(pp=2, vpp=2, world=2)
# Uneven stages and chunks over which deepstack features travel; dimensions beside virtual stages; context parallelism.
DENSE_SPLITS = [
    Layout(pp=4, world=4, stages="E|tt|tt|L"),
    Layout(pp=2, vpp=2, world=2, stages="Ett|t|t|L"),
    Layout(tp=2, sp=True, pp=2, vpp=2, world=4),
    Layout(cp=2, world=2),
]
EXPERT_SPLITS = [Layout(ep=2, pp=2, vpp=2, world=4), Layout(tp=2, sp=True, etp=1, world=2)]
OWN_STAGE = Layout(pp=3, world=3, stages="Ettt|tm|L")
MTP_LAYOUTS = [
    Layout(),
    Layout(pp=2, world=2),
    OWN_STAGE,
    Layout(tp=2, sp=True, pp=3, world=6, stages="Ettt|tm|L"),
    Layout(pp=3, world=3, stages="Etttt|m|L"),
    VIRTUAL,
    Layout(pp=2, cp=2, world=4),
]
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "experts": {"experts": {}},
    "some-experts": {"experts": {"mlp_only_layers": [1]}},
    "mtp": {},
    "mtp-tied": {"tied": True},
    "mtp-experts": {"experts": {}},
    "linear": {"linear": {}},
    "mtp-linear-experts": {"linear": {}, "experts": {}},
}
CASES = [(kind, layout) for kind in ("untied", "tied") for layout in (*LAYOUTS, VIRTUAL)]
CASES += [(kind, layout) for kind in ("experts", "some-experts") for layout in EXPERT_LAYOUTS]
CASES += [("untied", layout) for layout in DENSE_SPLITS] + [("experts", layout) for layout in EXPERT_SPLITS]
CASES += [(kind, layout) for kind in ("mtp", "mtp-tied") for layout in MTP_LAYOUTS]
CASES += [("mtp-experts", layout) for layout in (*EXPERT_LAYOUTS, OWN_STAGE)]
CASES += [("linear", layout) for layout in (*LAYOUTS, VIRTUAL, Layout(tp=2, cp=2, world=4))]
CASES += [
    ("mtp-linear-experts", layout) for layout in (*EXPERT_LAYOUTS, Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=4))
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind the Hugging Face folder `hf`; beside it lies its import `megatron`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sources = {}
    for kind, options in KINDS.items():
        write = mtp_reference.write_mtp_checkpoint if kind.startswith("mtp") else reference.write_checkpoint
        sources[kind] = write(folder / kind / "hf", **options)
    for source in sources.values():
        import_checkpoint(source, source.parent / "megatron")
    return sources


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file, byte by byte, but for the checksums."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_identical(sources: dict[str, Path], kind: str) -> None:
    source = sources[kind]
    exported = export_checkpoint(source.parent / "megatron", source.parent / "exported")
    assert files_of(exported) == files_of(source)


@pytest.mark.parametrize(("kind", "layout"), in_turn(CASES, 6), ids=str)
def test_megatron_loads_it_and_saves_it(pool: Pool, sources: dict[str, Path], kind: str, layout: Layout) -> None:
    source = sources[kind]
    conversation = reference.conversation("mixed", seed=21)
    saved = source.parent / f"saved-{layout}"
    results = pool.run(
        ranks.load_run_save,
        layout,
        folder=source,
        checkpoint=source.parent / "megatron",
        # Virtual stages want as many micro-batches as there are stages.
        packs=[reference.pack([conversation], 96)] * (layout.dp * layout.vpp),
        saved=saved,
        # More rows than the vocabulary, as Megatron pads it to a multiple of the tensor-parallel size.
        vocab_size=192,
    )
    expected = reference.run_transformers(source, [conversation]).logits[0]
    found = ranks.of_packs(results, "logits", layout, [[len(conversation.tokens)]] * layout.dp)[0][
        : len(expected), : expected.shape[1]
    ]
    assert reference.relative_error(found, expected) < 1e-5

    exported = export_checkpoint(saved, source.parent / f"exported-{layout}", like=source)
    before, after = weights_of(source), weights_of(exported)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
