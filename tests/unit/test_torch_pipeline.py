"""The keywords of a torch schedule and what a stage makes of them, without processes."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.utils import _pytree

from megatron_vlbridge import split_global_batch
from megatron_vlbridge.integrations import MediaStage, WholeBatch, media_kwargs
from megatron_vlbridge.integrations import torch_pipeline as integration
from tests import reference
from tests.errors import rejects
from tests.unit.test_samples import assert_holds, marked_batch

Batch = dict[str, Tensor]


class Records(nn.Module):
    """A part of a model that returns what it is called with."""

    def forward(self, *inputs: Tensor, **keywords: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return inputs, keywords


def batch_of(counts: list[int]) -> Batch:
    """Samples with these numbers of images, whose patches are all of the sample's index."""
    size = len(counts)
    samples = torch.arange(size).repeat_interleave(torch.tensor(counts))
    return {
        "input_ids": torch.arange(size)[:, None].expand(size, 5).clone(),
        "labels": torch.zeros(size, 5, dtype=torch.int64),
        "position_ids": torch.arange(size)[None, :, None].expand(3, size, 5).clone(),
        "attention_mask": torch.ones(size, 5, dtype=torch.int64),
        "mm_token_type_ids": torch.zeros(size, 5, dtype=torch.int64),
        "n_images_per_sample": torch.tensor(counts),
        "image_grid_thw": torch.tensor([[1, 2, 2]]).expand(len(samples), 3).clone(),
        "pixel_values": samples.repeat_interleave(4)[:, None].expand(-1, 3).float(),
    }


def test_each_micro_batch_has_the_media_of_its_samples() -> None:
    """In 500 random batches, cut by torch, the micro-batches in any order and more than once."""
    stage = MediaStage(Records())
    for seed in range(500):
        batch, samples = marked_batch(seed)
        draw, size = random.Random(seed), len(samples)
        batch["position_ids"] = batch["input_ids"].expand(3, size, -1).clone()
        n = draw.choice([n for n in range(1, size + 1) if size % n == 0])
        keywords = media_kwargs(batch, n_microbatches=n)
        ids, of_parts = split_args_kwargs_into_chunks((batch["input_ids"],), keywords, n)
        assert len(of_parts) == n
        for part in draw.choices(range(n), k=2 * n):
            chosen = list(range(part * size // n, (part + 1) * size // n))
            inputs, found = stage(*ids[part], **of_parts[part])
            assert all(len(tensor) for tensor in found.values())
            counts = {f"n_{kind}_per_sample": [len(samples[i][kind]) for i in chosen] for kind in ("images", "videos")}
            expected = {key: torch.tensor(value) for key, value in counts.items()} | {"input_ids": inputs[0]}
            assert_holds(found | expected, chosen, samples)
            assert ("pixel_values" in found) == (sum(counts["n_images_per_sample"]) > 0)
            assert ("pixel_values_videos" in found) == (sum(counts["n_videos_per_sample"]) > 0)
    assert list(vars(stage)) == list(vars(nn.Module())), "kept something"


def test_the_first_stage_gets_media_and_the_others_positions_and_mask() -> None:
    batch = batch_of([1, 2])
    stage, keywords = MediaStage(Records()), media_kwargs(batch)
    inputs, found = stage(batch["input_ids"], **keywords, scale=2, other="kept")
    assert inputs[0] is batch["input_ids"]
    media = {"image_grid_thw", "pixel_values"}
    assert found.keys() == media | {"position_ids", "attention_mask", "scale", "other"}
    assert (found["scale"], found["other"]) == (2, "kept")
    hidden = torch.zeros(2, 5, 7), torch.zeros(2, 5, 7)
    inputs, found = stage(*hidden, **keywords, scale=2)
    assert [x is y for x, y in zip(inputs, hidden, strict=True)] == [True, True]
    assert found.keys() == {"position_ids", "attention_mask", "scale"}
    assert torch.equal(found["position_ids"], batch["position_ids"])


def test_the_keywords_hold_a_leaf_and_an_index() -> None:
    keywords = media_kwargs(batch_of([1, 0, 1]))
    assert keywords["sample_index"].tolist() == [0, 1, 2]
    assert isinstance(keywords["whole"], WholeBatch)
    assert _pytree.tree_leaves(keywords["whole"]) == [keywords["whole"]]
    assert keywords["whole"].tensors.keys().isdisjoint({"input_ids", "labels"})
    assert keywords["whole"].select(torch.tensor([2]))["pixel_values"].unique().tolist() == [2.0]


def test_a_part_of_a_batch_does_instead() -> None:
    stage, batch = MediaStage(Records()), batch_of([1, 0])
    (_, first), (_, second) = (stage(part.pop("input_ids"), **part) for part in split_global_batch(batch, 2))
    assert first.keys() == {"image_grid_thw", "pixel_values", "position_ids", "attention_mask"}
    assert second.keys() == {"position_ids", "attention_mask"}
    assert second["position_ids"].unique().tolist() == [1]


def test_positions_of_text_may_have_one_axis() -> None:
    batch = batch_of([1, 0, 2, 0]) | {"position_ids": torch.arange(4)[:, None].expand(4, 5)}
    keywords = media_kwargs(batch, n_microbatches=2)
    keywords["sample_index"] = keywords["sample_index"][2:]
    _, found = MediaStage(Records())(batch["input_ids"][2:], **keywords)
    assert found["position_ids"].unique().tolist() == [2, 3]


def test_the_batch_is_checked() -> None:
    batch = batch_of([1, 1])
    with rejects("position_ids: expected them for every stage, found none", "get_rope_index"):
        media_kwargs({key: x for key, x in batch.items() if key != "position_ids"})
    with rejects("n_images_per_sample", "which sum to 3"):
        media_kwargs(batch | {"n_images_per_sample": torch.tensor([1, 2])})
    with rejects("expected 4 micro-batches of the same number of samples, found 6"):
        media_kwargs(batch_of([1] * 6), n_microbatches=4)
    media_kwargs(batch_of([1] * 6))


def test_placeholders_are_checked_with_a_config(tmp_path: Any) -> None:
    from megatron_vlbridge import read_config

    config = read_config(reference.write_checkpoint(tmp_path))
    with rejects("sample 1: expected 1 image tokens"):
        media_kwargs(batch_of([0, 1]), config=config)


def test_keywords_that_do_not_belong_together_are_rejected() -> None:
    stage, batch = MediaStage(Records()), batch_of([1, 1])
    keywords = media_kwargs(batch)
    with rejects("MediaStage of Records", "keywords of media_kwargs(batch)", "found none"):
        stage(batch["input_ids"])
    with rejects("found pixel_values"):
        stage(batch["input_ids"], pixel_values=batch["pixel_values"])
    with rejects("expected pixel_values only in media_kwargs(batch)"):
        stage(batch["input_ids"], pixel_values=batch["pixel_values"], **keywords)
    with rejects("expected 2 samples, those of the media, found an input of 1"):
        stage(batch["input_ids"][:1], **keywords)
    with rejects("found none"):
        stage(batch["input_ids"], whole=keywords["whole"])


def test_models_that_are_not_verified_are_rejected() -> None:
    import transformers

    text = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size_per_layer_input": 32}
    gemma = transformers.Gemma4TextModel(transformers.Gemma4TextConfig(**text, hidden_size_per_layer_input=4))
    llama = transformers.LlamaConfig(**{key: text[key] for key in list(text)[:4]}, num_attention_heads=2)
    with rejects("Gemma4TextModel: its layers read per-layer embeddings", "Verified are", "qwen3_vl"):
        MediaStage(nn.Sequential(gemma))
    with rejects("LlamaModel: it is not verified in stages"):
        MediaStage(transformers.LlamaModel(llama))


def test_each_verified_package_exists_and_is_not_rejected() -> None:
    import importlib

    for name in (*integration.VERIFIED, *integration.REJECTED):
        importlib.import_module(f"transformers.models.{name}")
    assert not set(integration.VERIFIED) & set(integration.REJECTED)
