"""Run on each rank: pipelines that would lose media, each with one fault, given to the check before the first step."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron_vlbridge import Config, read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations import MediaStage, check_pipeline_media
from tests import pipeline_models
from tests.functional.torch_pipeline_ranks import COUNTS, part_of
from tests.reference import IMAGE, VIDEO

Batch = dict[str, Tensor]


class DropsKeywords(nn.Module):
    """A wrapper as for logging or timing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor, **_: Any) -> Any:
        return self.module(*inputs)


class DropsKey(nn.Module):
    """A part of a model whose forward leaves out some keywords."""

    def __init__(self, part: nn.Module, *keys: str) -> None:
        super().__init__()
        self.part, self.keys = part, keys

    def forward(self, *inputs: Tensor, **keywords: Any) -> Any:
        return self.part(*inputs, **{key: x for key, x in keywords.items() if key not in self.keys})


class Detaches(nn.Module):
    """A part of a model that its input has no path through."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden: Tensor, **keywords: Any) -> Any:
        return self.part(hidden.detach(), **keywords)


class Declares(nn.Module):
    """A part that says it handles media, and reads only the language model."""

    handles_media = True

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, tokens: Tensor, *, whole: Any, sample_index: Tensor) -> Any:
        return self.part(tokens, position_ids=whole.select(sample_index)["position_ids"])


class SelectsItself(Declares):
    """A part that handles media as it says."""

    def select(self, whole: Any, sample_index: Tensor) -> dict[str, Tensor]:
        return whole.select(sample_index)

    def forward(self, tokens: Tensor, *, whole: Any, sample_index: Tensor) -> Any:
        batch = self.select(whole, sample_index)
        keys = ("position_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        return self.part(tokens, **{key: batch[key] for key in keys if key in batch and len(batch[key])})


class TakesOthers(SelectsItself):
    """A part that gives each sample the media of the one before."""

    def select(self, whole: Any, sample_index: Tensor) -> dict[str, Tensor]:
        return whole.select(sample_index) | {
            key: x for key, x in whole.select(sample_index.roll(1)).items() if key != "position_ids"
        }


class LooksAhead(nn.Module):
    """A part whose tokens depend on later ones."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, tokens: Tensor, **keywords: Any) -> Any:
        hidden = self.part(tokens, **keywords)
        return hidden + hidden.mean(1, keepdim=True)


def frozen_tower(part: nn.Module) -> nn.Module:
    """The tower runs, but its parameters, which shall learn, have no path."""
    forward = part.model.visual.forward
    part.model.visual.forward = torch.no_grad()(forward)
    return MediaStage(part)


def tower_everywhere(part: nn.Module) -> nn.Module:
    part.visual = pipeline_models.build("qwen3_vl").model.visual
    return MediaStage(part)


def unused_parameter(part: nn.Module) -> nn.Module:
    part.adapter = nn.Linear(2, 2)
    return MediaStage(part)


def token_less(batch: Batch) -> None:
    """One placeholder of an image became text."""
    first = (batch["input_ids"] == IMAGE).nonzero()[0].tolist()
    batch["input_ids"][first[0], first[1]] = 50


def edit(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Batch], None]:
    return lambda batch: batch.update({key: change(batch[key])})


def remove(key: str) -> Callable[[Batch], Any]:
    return lambda batch: batch.pop(key)


def plus(values: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x + torch.tensor(values)


def flat_positions(batch: Batch) -> None:
    size, length = batch["input_ids"].shape
    batch["position_ids"] = torch.arange(length).expand(size, length)


# What is done to the batch of both ranks, and words of the error.
BATCHES: dict[str, tuple[Callable[[Batch], Any], str]] = {
    "an image too many": (edit("n_images_per_sample", plus([0, 1, 0, 0])), "n_images_per_sample.*of 4 images"),
    "an image too few": (edit("n_images_per_sample", plus([-1, 0, 0, 0])), "n_images_per_sample.*of 4 images"),
    "a video too many": (edit("n_videos_per_sample", plus([0, 0, 2, 0])), "n_videos_per_sample.*of 2 videos"),
    "a video too few": (edit("n_videos_per_sample", plus([0, -1, 0, 0])), "n_videos_per_sample.*of 2 videos"),
    "no counts": (remove("n_images_per_sample"), "n_images_per_sample beside it, found none"),
    "no grids": (remove("video_grid_thw"), "video_grid_thw beside it, found none"),
    "no pixels": (remove("pixel_values"), "pixel_values beside it, found none"),
    "a patch less": (edit("pixel_values", lambda x: x[1:]), "pixel_values: expected.*patches"),
    "counts of other samples": (edit("n_images_per_sample", plus([-1, 0, 1, 0])), "stage 0 (Part).*do not match"),
    "a placeholder less": (token_less, "stage 0 (Part).*do not match"),
    "no positions": (remove("position_ids"), "position_ids: expected them for every stage"),
    "no tokens": (remove("input_ids"), "expected input_ids on the first stage"),
    "positions of text": (flat_positions, "expected position_ids [3, B, S].*get_rope_index"),
    "samples that do not divide": (
        lambda batch: [batch.clear(), batch.update(pipeline_models.batch_of("qwen3_vl", [(1, 0)] * 3, 1))],
        "expected 2 micro-batches of the same number of samples",
    ),
    "no media": (lambda batch: batch.update(_text()), "expected a batch with an image or video, found none"),
    "an unknown key": (lambda batch: batch.update(image_position_ids=torch.zeros(3, 2)), "found image_position_ids"),
}
# What stands in for `MediaStage` on the first and on the last stage, and words of the error.
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], str]] = {
    "no MediaStage": (lambda part: part, MediaStage, "stage 0 (Part): expected a MediaStage"),
    "no MediaStage at the end": (MediaStage, lambda part: part, "stage 1 (Part): expected a MediaStage"),
    "a wrapper without keywords": (
        lambda part: DropsKeywords(MediaStage(part)),
        MediaStage,
        "stage 0 (Part).*expected the keywords of media_kwargs.*around this one",
    ),
    "a wrapper without keywords at the end": (
        MediaStage,
        lambda part: DropsKeywords(MediaStage(part)),
        "stage 1 (Part).*expected the keywords of media_kwargs",
    ),
    "no images": (
        lambda part: MediaStage(DropsKey(part, "pixel_values", "image_grid_thw")),
        MediaStage,
        "stage 0 (DropsKey): expected other pixels of images to change.*9 tokens.*found: module.part.model.visual",
    ),
    "no videos": (
        lambda part: MediaStage(DropsKey(part, "pixel_values_videos", "video_grid_thw")),
        MediaStage,
        "stage 0 (DropsKey): expected other pixels of videos to change",
    ),
    "a declaration that is not true": (
        Declares,
        MediaStage,
        "stage 0 (Declares): expected other pixels of images to change",
    ),
    "the media of others": (
        TakesOthers,
        MediaStage,
        "stage 0 (TakesOthers): expected other pixels of images to change.*the media of another",
    ),
    "later tokens": (
        lambda part: MediaStage(LooksAhead(part)),
        MediaStage,
        "stage 0 (LooksAhead): expected other pixels of images to change only their tokens and later ones",
    ),
    "no positions at the start": (
        lambda part: MediaStage(DropsKey(part, "position_ids")),
        MediaStage,
        "stage 0 (DropsKey): its forward failed: ValueError.*M-RoPE",
    ),
    "no positions at the end": (
        MediaStage,
        lambda part: MediaStage(DropsKey(part, "position_ids")),
        "stage 1 (DropsKey): expected the batch's position_ids in module.part.model.rotary_emb",
    ),
    "a tower at the end": (
        MediaStage,
        tower_everywhere,
        "stage 1 (Part): expected the vision tower on the first stage",
    ),
    "a tower without gradients": (frozen_tower, MediaStage, "stage 0 (Part): expected a path.*module.model.visual"),
    "an unused parameter": (MediaStage, unused_parameter, "found none from module.adapter.weight, module.adapter.bias"),
    "a detached input": (
        MediaStage,
        lambda part: MediaStage(Detaches(part)),
        "stage 1 (Detaches): expected a path to the loss from its input",
    ),
}


def _text() -> Batch:
    return pipeline_models.batch_of("qwen3_vl", COUNTS["text"], 1) | {
        "n_images_per_sample": torch.zeros(4, dtype=torch.int64),
        "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
        "pixel_values": torch.zeros(0, 96),
        "n_videos_per_sample": torch.zeros(4, dtype=torch.int64),
        "video_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
        "pixel_values_videos": torch.zeros(0, 96),
    }


def _config() -> Config:
    with tempfile.TemporaryDirectory() as folder:
        pipeline_models.config_of("qwen3_vl").save_pretrained(folder)
        return read_config(folder)


def check(stages: Any, batch: Batch, **options: Any) -> str:
    """The error of the check, or nothing."""
    try:
        check_pipeline_media(stages, batch, 2, image_token_id=IMAGE, video_token_id=VIDEO, **options)
    except VLBridgeError as error:
        return str(error)
    return ""


def stages_of(kind: str, of_rank: int, *wraps: Callable[..., nn.Module]) -> list[PipelineStage]:
    rank, world = dist.get_rank(), dist.get_world_size()
    result = []
    for index in range(rank, of_rank * world, world):
        wrap = wraps[rank] if wraps else MediaStage
        result.append(
            PipelineStage(wrap(part_of(kind, index, of_rank * world)[0]), index, of_rank * world, torch.device("cpu"))
        )
    return result


def _batch(kind: str = "qwen3_vl") -> Batch:
    counts = [(1, 0), (1, 0), (0, 1), (2, 1)]
    counts = [(images, 0) for images, _ in counts] if kind in pipeline_models.IMAGES_ONLY else counts
    return pipeline_models.batch_of(kind, counts, 3)


def sabotage(_: Any) -> dict[str, str]:
    """The errors of all faults."""
    found = {}
    plain = stages_of("qwen3_vl", 1)
    for name, (change, _words) in BATCHES.items():
        batch = _batch()
        change(batch)
        found[name] = check(plain, batch)
    for name, (first, last, _words) in MODULES.items():
        found[name] = check(stages_of("qwen3_vl", 1, first, last), _batch())
    other = pipeline_models.batch_of("qwen3_vl", COUNTS["mixed"], 3 + dist.get_rank())
    found["a dataset out of step"] = check(plain, other)
    batch = _batch() | {"n_images_per_sample": torch.tensor([1, 1, 2, 0])}
    found["counts of other samples, with a config"] = check(plain, batch, config=_config())
    return found


def accept(_: Any, kinds: Sequence[str]) -> list[str]:
    """The errors of pipelines without a fault, which the check must leave as they are."""
    errors = []
    for kind in kinds:
        batch = _batch(kind)
        later = {key: batch[key] for key in ("position_ids", "labels")}
        itself = [(1, (SelectsItself, MediaStage))] if kind == "qwen3_vl" else []
        for of_rank, wraps in ((1, ()), (2, ()), *itself):
            stages = stages_of(kind, of_rank, *wraps)
            parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
            modules = [module for stage in stages for module in stage.submod.modules()]
            parameters[0].grad = torch.ones_like(parameters[0])
            modules[1].eval()
            random, modes = torch.get_rng_state(), [module.training for module in modules]
            errors.append(check(stages, batch if dist.get_rank() == 0 else later))
            assert torch.equal(torch.get_rng_state(), random)
            assert [module.training for module in modules] == modes
            assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
            assert all(parameter.grad is None for parameter in parameters[1:])
            assert not any(module._forward_pre_hooks for module in modules)
    return errors


def too_few_layers(_: Any) -> str:
    """The error where the first stage has one layer and the model two levels of deepstack."""
    rank = dist.get_rank()
    stages = [
        PipelineStage(MediaStage(part_of("qwen3_vl", index, 5)[0]), index, 5, torch.device("cpu"))
        for index in range(rank, 5, 2)
    ]
    return check(stages, _batch())
