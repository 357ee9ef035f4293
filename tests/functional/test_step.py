"""Model inputs and a training step: images matter, invalid packs raise on every rank, options change no result."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from tests import reference
from tests.cases import later
from tests.functional import ranks, step_ranks
from tests.functional.parity import PACK_LENGTH, TOLERANCE, measure
from tests.functional.pool import Layout, Pool

TP2, PP2, DP2 = Layout(tp=2, world=2), Layout(pp=2, world=2), Layout(world=2)
TP2_SP = Layout(tp=2, sp=True, world=2)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FULL_BY_THREE = FULL | {"recompute_num_layers": 3}
FULL_BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


def conversations(*kinds: str, seed: int = 20) -> list[reference.Conversation]:
    return [reference.conversation(kind, seed + index) for index, kind in enumerate(kinds)]


def pack(*kinds: str, seed: int = 20) -> dict[str, torch.Tensor]:
    return reference.pack(conversations(*kinds, seed=seed), PACK_LENGTH)


# Invalid packs


@pytest.mark.parametrize("layout", [TP2, PP2], ids=str)
def test_an_invalid_pack_raises_the_same_error_on_every_rank_and_the_next_one_is_read(
    pool: Pool, folder: Path, layout: Layout
) -> None:
    good = pack("image", "text")
    invalid = good | {"image_grid_thw": good["image_grid_thw"] + 2}
    results = pool.run(step_ranks.read_each, layout, folder=folder, packs=[invalid, good])
    assert all(result == results[0] for result in results)
    assert "image patches" in results[0][0]
    assert results[0][1] == PACK_LENGTH


def test_every_kind_of_invalid_pack_raises_on_all_ranks_of_a_tensor_parallel_group(pool: Pool, folder: Path) -> None:
    """With an exception of another type the other ranks would hang."""
    good = pack("image", "text")
    invalid = {
        "labels": good["labels"][1:],
        "image_grid_thw": good["image_grid_thw"][:, 1:],
        "tokens": good["tokens"] + 100,
        "segment_lengths": torch.tensor(5),
        "images_per_segment": good["images_per_segment"][1:],
        "pixel_values": good["pixel_values"][1:],
    }
    packs = [good | {key: value} for key, value in invalid.items()]
    packs.append({key: value for key, value in good.items() if key != "videos_per_segment"})
    first, second = pool.run(step_ranks.read_each, TP2, folder=folder, packs=packs)
    assert first == second
    assert all(isinstance(result, str) for result in first)


def test_only_the_first_stage_gets_pixels_and_only_the_last_labels(pool: Pool, folder: Path) -> None:
    """The header has no pixels either: pickling an empty slice would include the whole storage."""
    layout = Layout(tp=2, pp=2, world=4)
    read = pack("images", "video")
    pixels = read["pixel_values"].nbytes + read["pixel_values_videos"].nbytes
    patches = len(read["pixel_values"]) + len(read["pixel_values_videos"])
    found = pool.run(step_ranks.what_a_stage_reads, layout, folder=folder, pack=read)
    assert [rank["patches"] for rank in found] == [patches, patches, 0, 0]
    assert [rank["labels"] for rank in found] == [0, 0, PACK_LENGTH, PACK_LENGTH]
    assert all(0 < rank["header"] < pixels / 2 for rank in found), pixels


# Images


def brighter(group: list[reference.Conversation], index: int) -> dict[str, torch.Tensor]:
    """The pack of the group with other pixels in one conversation; each has either images or videos."""
    kind, key = ("videos", "pixel_values_videos") if len(group[index].videos) else ("images", "pixel_values")
    packed = reference.pack(group, PACK_LENGTH)
    before = sum(len(getattr(c, kind)) for c in group[:index])
    packed[key][before : before + len(getattr(group[index], kind))] += 1.0
    return packed


@pytest.mark.parametrize("layout", [Layout(), PP2, TP2_SP], ids=str)
def test_pixels_change_the_first_stage_only_in_their_own_conversation(pool: Pool, folder: Path, layout: Layout) -> None:
    group = conversations("image", "video", "text", "image")
    with_media = (0, 1, 3)
    packs = [reference.pack(group, PACK_LENGTH), *(brighter(group, index) for index in with_media)]
    by_rank = [r for r in pool.run(step_ranks.first_stage, layout, folder=folder, packs=packs) if r]
    lengths = [len(c.tokens) for c in group]
    lengths.append(PACK_LENGTH - sum(lengths))
    before, *after = (torch.cat(parts, dim=-1).split(lengths) for parts in zip(*by_rank, strict=True))
    for changed, outputs in zip(with_media, after, strict=True):
        for segment, (old, new) in enumerate(zip(before, outputs, strict=True)):
            assert torch.equal(old, new) == (segment != changed), f"segment {segment}, changed {changed}"
        first = group[changed].tokens.tolist().index(reference.VIDEO if changed == 1 else reference.IMAGE)
        same = (before[changed] == outputs[changed]).all(dim=1)
        assert same[:first].all()
        assert not same[first:].any()


# Padded batches


def padded_batch(group: list[reference.Conversation], side: str) -> dict[str, torch.Tensor]:
    """The output of a processor for these conversations, padded with a placeholder id on one side."""
    width = max(len(c.tokens) for c in group) + 3
    ids = torch.full((len(group), width), 5)
    mask = torch.zeros_like(ids)
    for row, c in enumerate(group):
        span = slice(0, len(c.tokens)) if side == "right" else slice(width - len(c.tokens), width)
        ids[row, span], mask[row, span] = c.tokens, 1
    kinds = (ids == reference.IMAGE).long() + 2 * (ids == reference.VIDEO).long()
    media = {key: value for key, value in reference.pack(group, 2 * PACK_LENGTH).items() if key in MEDIA}
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds} | media


MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.mark.parametrize("side", ["left", later("right")])
@pytest.mark.parametrize("layout", [Layout(), TP2_SP], ids=str)
def test_padded_batch_equals_transformers(pool: Pool, folder: Path, layout: Layout, side: str) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    batch = padded_batch(conversations("images", "text", "mixed", "video"), side)
    with torch.no_grad():
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        expected = model(**batch, use_cache=False).logits
    found = torch.cat(pool.run(step_ranks.padded, layout, folder=folder, batch=batch), dim=-1)
    kept = batch["attention_mask"].bool()
    assert reference.relative_error(found[kept], expected[kept]) < TOLERANCE
    assert not found[~kept].any()

    labels = torch.where(kept & (batch["input_ids"] >= 20), batch["input_ids"], -100).roll(-1, dims=1)
    labels[:, -1] = -100
    labels[~kept] = -100
    losses = pool.run(step_ranks.padded, layout, folder=folder, batch=batch | {"labels": labels})
    per_token = {"reduction": "none", "ignore_index": -100}
    expected_losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, **per_token)
    for mine in losses:
        assert reference.relative_error(mine, expected_losses) < TOLERANCE
        assert not mine[labels == -100].any()


def test_unused_and_contradicting_arguments_are_rejected(pool: Pool, folder: Path) -> None:
    batch = padded_batch(conversations("image", "text"), "right")
    batch = {key: value for key, value in batch.items() if "video" not in key}
    unknown = {("pixel_value" if key == "pixel_values" else key): value for key, value in batch.items()}
    errors = pool.run(
        step_ranks.padded_errors,
        Layout(),
        folder=folder,
        calls=[
            batch,
            unknown,
            {},
            batch | {"inputs": object()},
            batch | {"mm_token_type_ids": batch["mm_token_type_ids"].roll(1, dims=1)},
            batch | {"attention_mask": batch["attention_mask"][:, 1:]},
            {"inputs": object(), "lengths": [3]},
            batch | {"lengths": [3, 2]},
            batch | {"packed_seq_params": object(), "cu_seqlens": [0, 5]},
        ],
    )[0]
    for error, start in zip(
        errors,
        [
            "",
            "VLBridgeError: Qwen3VLModel.forward does not take the arguments pixel_value, ",
            "VLBridgeError: ",
            "VLBridgeError: ",
            "VLBridgeError: mm_token_type_ids",
            "VLBridgeError: ",
            "VLBridgeError: Qwen3VLModel takes either",
            "VLBridgeError: lengths",
            "VLBridgeError: packed_seq_params",
        ],
        strict=True,
    ):
        assert error.startswith(start)
        assert bool(error) == bool(start)


# A step


def gradients_of(folder: Path, results: list[dict]) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    return find(config).table(config).to_hf(ranks.assemble([r["gradients"] for r in results]))


@pytest.mark.parametrize(
    ("first", "layout"),
    [
        ("text", TP2_SP),
        ("images", PP2),
        ("images", Layout(cp=2, world=2)),
        later("images", TP2_SP),
        later("text", PP2),
        later("text", Layout(cp=2, world=2)),
        *(later(first, DP2) for first in ("images", "text")),
    ],
    ids=str,
)
def test_overlapped_reduction_over_text_and_images_equals_transformers(
    pool: Pool, folder: Path, layout: Layout, first: str
) -> None:
    """Megatron counts gradients in the last micro-batch of a rank: one step ends with text, the other with images.

    With frozen parts: test_freeze.py.
    """
    groups = [conversations(*kinds, seed=30 + i) for i, kinds in enumerate((("image", "text"), ("mixed",)))]
    groups += [conversations("text", seed=40), conversations("text", "text", seed=50)]
    if first == "text":
        groups.reverse()
    packs = [reference.pack(group, PACK_LENGTH) for group in groups]
    before = packs[::-1]
    expected = reference.run_transformers(folder, [c for group in groups for c in group]).gradients
    results = pool.run(step_ranks.train_step, layout, folder=folder, packs=packs, before=before)
    for name, found in gradients_of(folder, results).items():
        assert reference.relative_error(found, expected[name]) < TOLERANCE, name


def test_text_only_packs_give_a_trainable_tower_zero_gradients(pool: Pool, folder: Path) -> None:
    packs, before = [pack("text", "text"), pack("text")], [pack("image"), pack("video")]
    results = pool.run(step_ranks.train_step, DP2, folder=folder, packs=packs, before=before)
    gradients = gradients_of(folder, results)
    tower = [x for name, x in gradients.items() if ".visual." in name]
    assert len(tower) > 50
    assert not torch.cat([x.flatten() for x in tower]).any()
    assert all(x.any() for name, x in gradients.items() if ".visual." not in name)


@pytest.mark.parametrize("layout", [DP2, TP2_SP, PP2], ids=str)
def test_no_supervised_token_gives_zero_loss_and_zero_gradients(pool: Pool, folder: Path, layout: Layout) -> None:
    packs = [pack("image", "text"), pack("text")]
    packs = [x | {"labels": torch.full_like(x["labels"], -100)} for x in packs]
    results = pool.run(step_ranks.train_step, layout, folder=folder, packs=packs)
    totals, counts = torch.stack([report for r in results for report in r["reports"]]).T
    assert not totals.any()
    # Megatron divides the sums of both.
    assert totals.sum() / counts.sum() == 0
    assert all(not x.any() for x in gradients_of(folder, results).values())


# Activation recomputation

GROUPS = (("mixed", "text"), ("text",), ("images", "video"))


@pytest.mark.parametrize("layout", [later(Layout()), TP2_SP, PP2], ids=str)
@pytest.mark.parametrize("options", [FULL_BY_THREE, later(FULL_BLOCK)], ids=["full-by-three", "full-block"])
def test_recomputation_of_several_layers_changes_nothing(
    pool: Pool, folder: Path, layout: Layout, options: dict
) -> None:
    groups = [conversations(*kinds, seed=60 + 10 * i) for i, kinds in enumerate(GROUPS)]
    measure(pool, layout, folder, groups, **options).check()


def test_recomputation_runs_the_layers_again(pool: Pool, folder: Path) -> None:
    def calls(**options: object) -> dict[str, int]:
        return pool.run(step_ranks.train_step, Layout(), folder=folder, packs=[pack("image")], **options)[0]["calls"]

    assert calls() == {"language": 1, "vision": 1}
    assert calls(**FULL) == {"language": 2, "vision": 2}


TOWER, TOWER_INPUT, WORDS = (
    "vision_model.",
    ("vision_model.patch_embed.", "vision_model.pos_embed."),
    "language_model.e",
)
HF_NAMES = {TOWER: ".visual.", TOWER_INPUT[0]: ".patch_embed.", TOWER_INPUT[1]: ".pos_embed.", WORDS: ".embed_tokens."}


@pytest.mark.parametrize("frozen", [(TOWER,), (WORDS,), (WORDS, TOWER), TOWER_INPUT])
@pytest.mark.parametrize("options", [later({}), FULL], ids=["plain", "full"])
def test_recomputation_with_frozen_modules_keeps_the_other_gradients(
    pool: Pool, folder: Path, options: dict, frozen: tuple[str, ...]
) -> None:
    group = conversations("mixed", "text")
    expected = reference.run_transformers(folder, group).gradients
    packs = [reference.pack(group, PACK_LENGTH)]
    results = pool.run(step_ranks.train_step, Layout(), folder=folder, packs=packs, frozen=frozen, **options)
    for name, found in gradients_of(folder, results).items():
        if any(HF_NAMES[part] in name for part in frozen):
            assert not found.any()
        else:
            assert reference.relative_error(found, expected[name]) < TOLERANCE, name


# Pipeline splits


def test_an_uneven_pipeline_split_equals_transformers(pool: Pool, folder: Path) -> None:
    groups = [conversations(*kinds, seed=60 + 10 * i) for i, kinds in enumerate(GROUPS)]
    measure(pool, PP2, folder, groups, num_layers_in_first_pipeline_stage=3).check()


def test_deepstack_over_several_stages_needs_variable_lengths(pool: Pool, folder: Path) -> None:
    errors = pool.run(step_ranks.build_with_fixed_lengths, PP2, folder=folder, num_layers_in_first_pipeline_stage=1)
    assert len(errors) == 2
    for error in errors:
        assert "deepstack features" in error
        assert "several pipeline stages" in error


def test_stages_of_fixed_length_reject_packs_of_another_length(pool: Pool, folder: Path) -> None:
    """The next stage would read rows that were not sent."""
    pack = reference.pack([reference.conversation("image", 3)], 64)
    error = pool.run(step_ranks.run_and_catch, PP2, folder=folder, packs=[pack], seq_length=96)[0]
    assert "64 tokens" in error
    assert "96" in error
