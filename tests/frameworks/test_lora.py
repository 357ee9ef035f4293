"""Adapters trained on Megatron are those of peft: the same logits, and the same gradient of each of its tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vlbridge import cli, read_config
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.weights import Region
from tests import digits_checkpoint
from tests.closeness import relative_error
from tests.frameworks.lora_figures import Case, make_case, measure
from tests.functional import ranks
from tests.functional.pool import Layout, Pool
from tests.functional.test_training import train

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = r"model\.visual\..*\.(qkv|proj|linear_fc1|linear_fc2)(?<!patch_embed\.proj)"
# Without targets: all projections of the decoder layers.
TARGETS = {"dense": [*SEVEN, VISION], "experts": [*SEVEN[:4], *FUSED], "linear": None, "linear-experts": None}
PP2 = Layout(pp=2, world=2)
TP2_PP2_CP2 = Layout(tp=2, sp=True, pp=2, cp=2, world=8)
LAYOUTS = [
    Layout(),
    Layout(tp=2, world=2),
    Layout(tp=2, sp=True, world=2),
    PP2,
    Layout(pp=2, vpp=2, world=2),
    Layout(cp=2, world=2),
    TP2_PP2_CP2,
]
EP2 = Layout(ep=2, world=2)
TP2_EP2 = Layout(tp=2, sp=True, ep=2, etp=1, world=2)
CASES = [
    *(("dense", layout) for layout in LAYOUTS),
    ("experts", EP2),
    ("experts", TP2_EP2),
    ("linear", Layout(cp=2, world=2)),
    ("linear-experts", TP2_PP2_CP2),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> "Cases":
    return Cases(tmp_path_factory.mktemp("lora"))


class Cases:
    """A case of each kind, made when it is asked for."""

    def __init__(self, where: Path) -> None:
        self.where, self.made = where, dict[str, Case]()

    def of(self, kind: str) -> Case:
        if kind not in self.made:
            self.made[kind] = make_case(self.where / kind, kind, TARGETS[kind])
        return self.made[kind]


@pytest.mark.filterwarnings("error:.*(unexpected|missing).*:UserWarning")
@pytest.mark.parametrize(("kind", "layout"), CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(pool: Pool, cases: Cases, kind: str, layout: Layout) -> None:
    case = cases.of(kind)
    errors = measure(pool, layout, case)
    assert errors.logits < case.bound
    assert errors.gradients[errors.worst] < case.bound, errors.worst


@pytest.mark.filterwarnings("error:.*(unexpected|missing).*:UserWarning")
def test_what_the_commands_export_and_merge_is_the_model_of_the_run(pool: Pool, tmp_path: Path) -> None:
    """A run of the example, `vlbridge export --adapter`, peft with that folder, and `vlbridge merge`."""
    folder = digits_checkpoint.write(tmp_path)
    base, adapter, merged = folder / "hf", folder / "adapter", folder / "merged"
    lora = {"rank": 4, "alpha": 16, "vision": True}
    arguments = ("--hf-folder", "hf", "--hf-weights", "--lora-rank", 4, "--lora-alpha", 16, "--lora-vision")
    arguments += ("--save", "run", "--save-interval", 3, "--train-iters", 3)
    train(folder, *arguments, "--tensor-model-parallel-size", 2, "--sequence-parallel", processes=2)
    assert cli.main(["export", str(folder / "run"), str(adapter), "--adapter", "--like", str(base)]) == 0
    assert cli.main(["merge", str(base), str(adapter), str(merged)]) == 0

    data = read_conversations(folder / "train.jsonl")
    packs = PackedConversations(
        data, AutoProcessor.from_pretrained(base), read_config(base), seq_length=256, num_samples=2, multiple_of=4
    )
    run = TorchDistFolder(folder / "run")
    values = {name: run.read(Region.whole(name, spec.shape)) for name, spec in run.table.items()}
    results = pool.run(ranks.forward_backward, PP2, folder=base, packs=[packs[0]], lora={**lora, "values": values})
    (found,) = ranks.of_packs(results, "logits", PP2, [packs[0]["segment_lengths"].tolist()])

    inputs = first_conversation(packs[0], load(base).config.image_token_id)
    model = PeftModel.from_pretrained(load(base), adapter)
    expected = model(**inputs).logits[0].detach()
    assert relative_error(found[: len(expected), : expected.shape[1]], expected) < 1e-5
    assert relative_error(load(base)(**inputs).logits[0], expected) > 1e-3
    state = model.merge_and_unload().state_dict()
    for name, x in load(merged).state_dict().items():
        assert torch.equal(x, state[name]), name


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def first_conversation(pack: Mapping[str, torch.Tensor], image: int) -> dict[str, Any]:
    """The arguments of transformers' model for the first conversation of a pack."""
    tokens, grids = (
        pack["tokens"][: pack["segment_lengths"][0]],
        pack["image_grid_thw"][: pack["images_per_segment"][0]],
    )
    return {
        "input_ids": tokens[None],
        "mm_token_type_ids": (tokens == image).long()[None],
        "pixel_values": pack["pixel_values"][: grids.prod(1).sum()],
        "image_grid_thw": grids,
    }
