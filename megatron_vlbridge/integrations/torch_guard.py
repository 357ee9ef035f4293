"""Check the media of a pipeline of `torch.distributed.pipelining` before the first step."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.samples import select_samples
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations.torch_pipeline import media_kwargs
from megatron_vlbridge.integrations.torch_probe import (
    Change,
    Like,
    MicroBatch,
    check_path,
    check_pixels,
    evaluating,
    other_positions,
    outputs_of,
    towers,
)


def check_pipeline_media(
    stages: PipelineStage | Sequence[PipelineStage],
    batch: Mapping[str, Tensor],
    n_microbatches: int,
    *,
    image_token_id: int,
    video_token_id: int | None = None,
    config: Config | None = None,
) -> None:
    """Reject, on every rank, a pipeline that would train without its images, or with wrong positions.

    Call it on all ranks of the pipeline before the first step, with this rank's stage or stages and a small batch with
    images, and with videos if there will be any. All ranks have the same batch; those after the first stage may leave
    out pixels. Each micro-batch is run on each stage, on the first again with other pixels of each sample: each media
    token must change, and nothing before the first one or in other samples. Every rotary embedding must get the
    batch's positions, and what requires a gradient have a path to the loss. Gradients, modes and random numbers stay as
    they were.

    Raises VLBridgeError, the same on all ranks, with the findings of all stages: model class, stage, what is missing,
    remedy.

    Example: `check_pipeline_media(stage, batch, 4, image_token_id=config.image_token_id)`.
    """
    own = [stages] if isinstance(stages, PipelineStage) else list(stages)
    group = own[0].group
    tokens = {"image": image_token_id} | ({} if video_token_id is None else {"video": video_token_id})
    findings, keywords = _check_inputs(own, batch, n_microbatches, config)
    findings += _compare_digests(own, batch, group)
    _raise_on_all_ranks(findings, group)
    findings = [finding for stage in own for finding in _check_module(stage)]
    likes: list[list[Like]] | None = None
    for index in range(own[0].num_stages):
        result: tuple[list[list[Like]] | None, list[str]] | None = None
        for stage in own:
            if stage.stage_index == index and (stage.is_first or likes is not None):
                parts = _micro_batches(stage, batch, keywords, n_microbatches, tokens)
                result = _probe(stage, parts, likes)
        likes = next((x for x in _gather(result and result[0], group) if x is not None), None)
        findings += result[1] if result else []
    _raise_on_all_ranks(findings, group)


def _check_inputs(
    own: Sequence[PipelineStage], batch: Mapping[str, Tensor], n_microbatches: int, config: Config | None
) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with the batch, and else the keywords of the stages."""
    try:
        keywords = media_kwargs(batch, config=config, n_microbatches=n_microbatches)
    except VLBridgeError as error:
        return [f"{_name(own[0])}: {error}"], {}
    if any(stage.is_first for stage in own) and "input_ids" not in batch:
        return [f"{_name(own[0])}: batch: expected input_ids on the first stage, found {', '.join(batch)}."], {}
    return [], keywords


def _compare_digests(own: Sequence[PipelineStage], batch: Mapping[str, Tensor], group: Any) -> list[str]:
    """Keys that other ranks of the pipeline have with other values."""
    mine = {key: _digest(tensor) for key, tensor in batch.items()}
    findings = []
    for name, theirs in _gather((_name(own[0]), mine), group):
        other = [key for key in mine if theirs.get(key, mine[key]) != mine[key]]
        if other:
            findings.append(
                f"{_name(own[0])}: batch: expected the samples of {name}, found other {', '.join(other)}. The stages "
                "of a pipeline must read the same samples in the same order: same seed, same position in the dataset."
            )
    return findings[:1]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _check_module(stage: PipelineStage) -> list[str]:
    """Whether a stage declares that it handles media, and has a tower only if it is the first."""
    findings = []
    if not _declares(stage.submod):
        findings.append(
            f"{_name(stage)}: expected a MediaStage, or a module with handles_media = True that selects its "
            "samples from the keywords of media_kwargs, found none. Wrap it: MediaStage(module)."
        )
    found = towers(stage.submod)
    if found and not stage.is_first:
        findings.append(
            f"{_name(stage)}: expected the vision tower on the first stage only, found {', '.join(found)}. "
            "Set it to None here."
        )
    return findings


def _declares(module: nn.Module) -> bool:
    return any(getattr(part, "handles_media", False) for part in module.modules())


def _micro_batches(
    stage: PipelineStage, batch: Mapping[str, Tensor], keywords: dict[str, Any], n: int, tokens: Mapping[str, int]
) -> list[MicroBatch]:
    """The micro-batches as the schedule cuts them."""
    parts = []
    for index in keywords["sample_index"].tensor_split(n):
        given = keywords | {"sample_index": index}
        positions = keywords["whole"].select(index)["position_ids"]
        if not stage.is_first:
            parts.append(MicroBatch(given, positions))
            continue
        ids = batch["input_ids"][index.to(batch["input_ids"].device)]
        changes = [
            Change(kind, row, _with_other_pixels(batch, kind, sample) | {"sample_index": index}, ids[row] == token)
            for kind, token in tokens.items()
            for row, sample in enumerate(index.tolist())
            if f"n_{kind}s_per_sample" in batch and int(batch[f"n_{kind}s_per_sample"][sample])
        ]
        parts.append(MicroBatch(given, positions, ids, changes))
    return parts


def _with_other_pixels(batch: Mapping[str, Tensor], kind: str, sample: int) -> dict[str, Any]:
    """The keywords after one was added to the pixels of a sample's images or videos."""
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    number = torch.arange(len(batch[key]), dtype=torch.float64)
    own = select_samples({**batch, key: number[:, None]}, [sample])[key].flatten().long()
    changed = batch[key].clone()
    changed[own.to(changed.device)] += 1
    return media_kwargs({**batch, key: changed})


def _probe(
    stage: PipelineStage, parts: Sequence[MicroBatch], likes: list[list[Like]] | None
) -> tuple[list[list[Like]] | None, list[str]]:
    """Run the stage; what its output is like for each micro-batch, and what is wrong with it."""
    module, device = stage.submod, torch.device(stage.device)
    if not _declares(module):
        return None, []
    findings: list[str] = []
    results: list[list[Like]] = []
    try:
        with evaluating(module, device):
            inputs = [_inputs(part, likes[i] if likes else [], device) for i, part in enumerate(parts)]
            with torch.no_grad():
                for arguments, part in zip(inputs, parts, strict=True):
                    with other_positions(module, part.position_ids) as names:
                        outputs = outputs_of(module(*arguments, **part.keywords))
                    results.append([Like(tuple(x.shape), x.dtype) for x in outputs])
                    findings += [_other_positions_text(name) for name in names]
                findings += _check_axes(module, parts) + check_pixels(module, parts) if stage.is_first else []
            findings += check_path(module, inputs, parts)
    except Exception as error:  # noqa: BLE001  any failure of a user's module is a finding, on all ranks
        return None, [f"{_name(stage)}: its forward failed: {type(error).__name__}: {error}"]
    return results, [f"{_name(stage)}: {finding}." for finding in dict.fromkeys(findings)]


def _inputs(part: MicroBatch, likes: Sequence[Like], device: torch.device) -> list[Tensor]:
    return [like.tensor(device) for like in likes] if part.input_ids is None else [part.input_ids]


def _other_positions_text(name: str) -> str:
    return (
        f"expected the batch's position_ids in {name}, found others, as transformers makes them if it gets none. Pass "
        "position_ids on in the forward of this stage"
    )


def _check_axes(module: nn.Module, parts: Sequence[MicroBatch]) -> list[str]:
    """Positions of a model with MRoPE have three axes, which differ within an image."""
    ropes = [getattr(getattr(part, "config", None), "rope_parameters", None) for part in module.modules()]
    if not any("mrope_section" in rope for rope in ropes if isinstance(rope, Mapping)):
        return []
    # Two tokens of one image: height or width differ.
    positions = [part.position_ids for part in parts if any((x.tokens[1:] & x.tokens[:-1]).any() for x in part.changes)]
    if not positions or any(x.dim() == 3 and bool((x != x[:1]).any()) for x in positions):
        return []
    return [
        "expected position_ids [3, B, S] of time, height and width, found the same on all axes, with images. "
        "Compute them with the model's get_rope_index, with the grids"
    ]


def _name(stage: PipelineStage) -> str:
    module = stage.submod
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return f"stage {stage.stage_index} ({type(module).__name__})"


def _gather(value: Any, group: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _raise_on_all_ranks(findings: list[str], group: Any) -> None:
    everyone = list(dict.fromkeys(finding for of_rank in _gather(findings, group) for finding in of_rank))
    if everyone:
        raise VLBridgeError("pipeline: media would not reach their tokens.\n" + "\n".join(f"- {x}" for x in everyone))
