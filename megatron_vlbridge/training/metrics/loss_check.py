"""A loss that is not finite ends the run on all ranks, before the gradients are used."""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_vlbridge.checkpoint.live.collectives import gather
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.model.inputs import PackedInputs

# How many weights the error names.
_NAMED = 3


@dataclass(frozen=True)
class PackLoss:
    """The loss of a micro-batch on a rank of the last stage: its sum, and what is needed to find a token in it."""

    layout: BatchLayout
    labels: torch.Tensor
    loss_mask: torch.Tensor
    losses: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, inputs: PackedInputs, losses: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> "PackLoss":
        """From the inputs of the stage, its losses `[1, T]`, their sum and the number of supervised tokens."""
        assert inputs.labels is not None
        assert inputs.loss_mask is not None
        return cls(inputs.layout, inputs.labels, inputs.loss_mask, losses.detach(), total.detach(), count)


@dataclass(frozen=True, order=True)
class BadLoss:
    """The first token of a micro-batch on one rank whose loss is not finite, and how many these are.

    `place` is that in the pack, `segment` and `token` that in its conversation. Padding counts only where it is alone.
    """

    micro_batch: int
    dp_rank: int
    place: int
    segment: int
    token: int
    label: int | None
    loss: float
    tokens: int


def step_flags(packs: list[PackLoss]) -> tuple[bool, bool]:
    """Whether a loss of a step is not finite, and whether it has a supervised token, on any rank. Collective over all.

    `packs`: the micro-batches of this rank; none where it is not on the last stage.
    """
    flags = torch.zeros(2, device=torch.cuda.current_device())
    if packs:
        flags[0] = ~torch.stack([pack.total for pack in packs]).isfinite().all()
        flags[1] = torch.stack([pack.count for pack in packs]).sum() > 0
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    failed, supervised = flags.tolist()
    return bool(failed), bool(supervised)


def describe(model: list[torch.nn.Module], packs: list[PackLoss], first_item: int | None) -> str:
    """What is wrong with the losses, and what to do. The same text on all ranks, which all must call it.

    `first_item`: the item of the dataset that is the first pack of the global batch, if its order is that of items.
    """
    mine = []
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        dp_rank = parallel_state.get_data_parallel_rank()
        found = (first_bad_token(pack, number, dp_rank) for number, pack in enumerate(packs))
        mine = [bad for bad in found if bad is not None]
    everyone = gather((mine, _broken_weights(model)))
    weights = sorted({name for _, names in everyone for name in names})
    bad = sorted(one for found, _ in everyone for one in found)
    return _text(bad, parallel_state.get_data_parallel_world_size(), first_item) + _remedy(weights)


def _text(bad: list[BadLoss], dp_size: int, first_item: int | None) -> str:
    first = bad[0]
    packs = {(one.micro_batch, one.dp_rank) for one in bad}
    tokens = sum(one.tokens for one in bad if (one.micro_batch, one.dp_rank) == (first.micro_batch, first.dp_rank))
    item = first.micro_batch * dp_size + first.dp_rank
    source = "" if first_item is None else f", item {first_item + item} of the training dataset"
    where = "in the padding" if first.segment < 0 else f"at token {first.token} of segment {first.segment}"
    label = "not supervised" if first.label is None else f"label {first.label}"
    others = f"; {len(packs) - 1} other packs have such losses too" if len(packs) > 1 else ""
    return (
        f"micro-batch {first.micro_batch} of data-parallel rank {first.dp_rank}{source}: expected finite losses, found "
        f"{tokens} that are not, the first {where} ({label}): {first.loss}{others}. "
    )


def _remedy(weights: list[str]) -> str:
    if weights:
        more = f" and {len(weights) - _NAMED} more" if len(weights) > _NAMED else ""
        return (
            f"Weights are not finite either ({', '.join(weights[:_NAMED])}{more}): an earlier update broke them. "
            "Resume from the last checkpoint with a lower --lr or --clip-grad, or a longer --lr-warmup-iters"
        )
    return (
        "All weights are finite, and nothing was updated: look at the conversation, and at its images; if it is as it "
        "should be, lower --lr or --clip-grad and resume from the last checkpoint"
    )


def first_bad_token(pack: PackLoss, micro_batch: int, dp_rank: int) -> BadLoss | None:
    """Of a micro-batch on this rank; None where all its losses are finite."""
    bad = (~pack.losses[0].isfinite()).nonzero().flatten().cpu()
    if not len(bad):
        return None
    places = pack.layout.gather_index[bad]
    ends = torch.tensor(pack.layout.lengths).cumsum(0)
    # Padding has no place; its tokens come last.
    order = int(places.masked_fill(places < 0, int(ends[-1])).argmin())
    here, place = int(bad[order]), int(places[order])
    segment = int(torch.searchsorted(ends, place, right=True)) if place >= 0 else -1
    start = int(ends[segment - 1]) if segment > 0 else 0
    supervised = bool(pack.loss_mask[0, here])
    return BadLoss(
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        place=place if place >= 0 else int(ends[-1]),
        segment=segment,
        token=place - start,
        label=int(pack.labels[0, here]) if supervised else None,
        loss=float(pack.losses[0, here]),
        tokens=int((places >= 0).sum()) or len(bad),
    )


def _broken_weights(model: list[torch.nn.Module]) -> list[str]:
    """The names of this rank's weights that are not finite, without those of Megatron's wrappers."""
    named = (pair for chunk in model for pair in chunk.named_parameters())
    return [name.replace("module.", "") for name, x in named if not bool(x.isfinite().all())]
