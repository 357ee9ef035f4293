"""The calls of other frameworks, rebuilt from their sources, in Megatron's schedule.

A call gives keywords for `Qwen3VLModel.forward`, and for each token of its output the label and which token of the
joined conversations it is (-1: padding).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model

from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.checkpoint.live.shards import modules_of
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.guards import check_layout
from tests import reference
from tests.functional import ranks
from tests.functional.pool import Layout

FILLER = 5


@dataclass(frozen=True)
class Call:
    """Arguments of a call, and what its output stands for: flat `labels` and `owner`, in the order of the output.

    `rows` are those of the output, 1 for a pack; `losses`: it is losses, not logits.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    labels: torch.Tensor
    owner: torch.Tensor
    rows: int = 1
    losses: bool = False


Conversations = Sequence[reference.Conversation]


def zigzag(row: list[int], layout: Layout) -> list[int]:
    """This context-parallel rank's two chunks of a segment."""
    if layout.cp == 1:
        return row
    rank, size = parallel_state.get_context_parallel_rank(), len(row) // (2 * layout.cp)
    chunks = [row[i * size : (i + 1) * size] for i in range(2 * layout.cp)]
    return chunks[rank] + chunks[2 * layout.cp - 1 - rank]


def numbered(conversations: Conversations) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each conversation tokens, labels, and the places of its tokens in all of them joined."""
    starts = accumulate([len(c.tokens) for c in conversations], initial=0)
    return [
        (c.tokens.tolist(), c.labels.tolist(), list(range(start, start + len(c.tokens))))
        for c, start in zip(conversations, starts, strict=False)
    ]


def padded(row: list[int], multiple: int, fill: int) -> list[int]:
    """Up to a multiple of a length."""
    return row + [fill] * (-len(row) % multiple)


def parallel_multiple(layout: Layout) -> int:
    """What verl and slime pad segments to."""
    return layout.tp * layout.cp * (2 if layout.cp > 1 else 1)


def media(conversations: Conversations) -> dict[str, torch.Tensor]:
    """Of all conversations; keys that are empty are missing."""
    batch = reference.padded_batch(conversations)
    keys = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return {key: batch[key] for key in keys if len(batch[key])}


def segments_of(conversations: Conversations, layout: Layout) -> tuple[torch.Tensor, Callable[[int, int], list[int]]]:
    """`cu_seqlens` of padded segments, int32, and this rank's row of tokens (0), labels (1) or owners (2)."""
    multiple, rows = parallel_multiple(layout), numbered(conversations)
    bounds = list(accumulate((len(padded(tokens, multiple, 0)) for tokens, _, _ in rows), initial=0))

    def mine(kind: int, fill: int) -> list[int]:
        return [x for row in rows for x in zigzag(padded(row[kind], multiple, fill), layout)]

    return torch.tensor(bounds, dtype=torch.int32), mine


def verl_thd(conversations: Conversations, layout: Layout) -> Call:
    """verl 0.9.1, `model_forward.py`: whole padded rows and a bool mask beside the parameters of a pack."""
    bounds, mine = segments_of(conversations, layout)
    batch = reference.padded_batch(conversations)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
    )
    keywords = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"].bool(),
        "position_ids": None,
        "packed_seq_params": params,
    }
    return Call((), keywords | media(conversations), torch.tensor(mine(1, -100)), torch.tensor(mine(2, -1)))


def roll(conversations: Conversations, layout: Layout) -> Call:
    """ROLL 8eb27cc, `megatron_strategy.py`: as verl, with a long mask and keywords of its own."""
    call = verl_thd(conversations, layout)
    mask = call.keywords["attention_mask"]
    more = {"attention_mask": mask.long(), "loss_mask": mask.float(), "labels": None, "force_vit_image": True}
    more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return Call((), {**call.keywords, **more}, call.labels, call.owner)


def nemo_rl(conversations: Conversations, layout: Layout) -> Call:
    """NeMo-RL 7ea279a, `model_owns_packing`: the mask also keeps padding, the parameters say which it is."""
    call = verl_thd(conversations, layout)
    padded_bounds = call.keywords["packed_seq_params"].cu_seqlens_q
    sizes, lengths = padded_bounds.diff().tolist(), [len(c.tokens) for c in conversations]
    ids, mask = rows(conversations, max(sizes))
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    true = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=true, cu_seqlens_q_padded=padded_bounds)
    more = {"input_ids": ids, "attention_mask": mask, "packed_seq_params": params}
    return Call((), {**call.keywords, **more}, call.labels, call.owner)


def slime(conversations: Conversations, layout: Layout) -> Call:
    """slime 624b824, `model.py`: this rank's part of the row, its end padded by a segment of its own."""
    bounds, mine = segments_of(conversations, layout)
    tail = 16
    whole = torch.cat((bounds, bounds[-1:] + tail))

    def row(kind: int, fill: int) -> torch.Tensor:
        return torch.tensor([mine(kind, fill) + zigzag([fill] * tail, layout)])

    ids = row(0, 0)
    keywords = {
        "input_ids": ids,
        "position_ids": None,
        "attention_mask": None,
        "labels": None,
        "packed_seq_params": PackedSeqParams(qkv_format="thd", cu_seqlens_q=whole, cu_seqlens_kv=whole),
        "loss_mask": torch.ones(ids.shape),
        "mm_token_type_ids": torch.zeros(1, 7, dtype=torch.int64),
        "witness_ids": ids,
    }
    return Call((), keywords | media(conversations), row(1, -100)[0], row(2, -1)[0])


def miles(conversations: Conversations, layout: Layout) -> Call:
    """miles 31f1ca9, `model.py`: as slime, without the keys that it drops."""
    call = slime(conversations, layout)
    keywords = {key: x for key, x in call.keywords.items() if key not in ("mm_token_type_ids", "witness_ids")}
    return Call((), keywords, call.labels, call.owner)


def rows(conversations: Conversations, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right, and the bool mask of their tokens."""
    ids = torch.full((len(conversations), width), FILLER)
    for row, c in zip(ids, conversations, strict=True):
        row[: len(c.tokens)] = c.tokens
    return ids, torch.arange(width) < torch.tensor([len(c.tokens) for c in conversations])[:, None]


def padded_rows(conversations: Conversations, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, Call]:
    """Rows that are divisible over the ranks, their mask, and a call that gives this rank's part of each."""
    length = max(len(c.tokens) for c in conversations) + 1
    width = length + -length % (2 * layout.tp * layout.cp)
    ids, mask = rows(conversations, width)

    def part(kind: int, fill: int) -> torch.Tensor:
        mine = [zigzag(padded(row[kind], width, fill), layout) for row in numbered(conversations)]
        return torch.tensor([x for row in mine for x in row])

    return ids, mask, Call((), media(conversations), part(1, -100), part(2, -1), len(conversations))


def verl_bshd(conversations: Conversations, layout: Layout) -> Call:
    """verl 0.9.1, `model_forward.py`: whole rows on every rank, under context parallelism too."""
    ids, mask, call = padded_rows(conversations, layout)
    keywords = {"input_ids": ids, "attention_mask": mask, "position_ids": None}
    return Call((), {**call.keywords, **keywords}, call.labels, call.owner, call.rows)


def sky_rl(conversations: Conversations, layout: Layout) -> Call:
    """SkyRL a956457, `megatron_model_wrapper.py`: three arguments by position, a mask that is True at padding."""
    ids, mask, call = padded_rows(conversations, layout)
    keywords = {key: value for key, value in call.keywords.items() if key in ("image_grid_thw", "video_grid_thw")}
    if parallel_state.is_pipeline_first_stage():
        keywords = dict(call.keywords)
    arguments = (ids, None, (~mask)[:, None, None, :])
    return Call(arguments, keywords | {"packed_seq_params": None}, call.labels, call.owner, call.rows)


def areal(conversations: Conversations, layout: Layout) -> Call:
    """AReaL 4aef98d, `packed_context_parallel.py`: rows padded by zeros, no mask; it has no videos."""
    ids, mask, call = padded_rows(conversations, layout)
    keywords = {"input_ids": ids * mask, "attention_mask": None, "position_ids": None, "packed_seq_params": None}
    images = {key: x for key, x in call.keywords.items() if "video" not in key}
    assert len(images) == len(call.keywords)
    return Call((), {**images, **keywords}, call.labels, call.owner, call.rows)


def megatron_bridge(conversations: Conversations, layout: Layout) -> Call:
    """Megatron-Bridge 0.6.2, `vlm_step.py`: whole rows with labels and a loss mask; gives losses."""
    ids, mask, call = padded_rows(conversations, layout)
    labels = ids.roll(-1, 1)
    for row, c in zip(labels, conversations, strict=True):
        row[: len(c.tokens)] = torch.where(c.labels == -100, row[: len(c.tokens)], c.labels)
    loss_mask = torch.zeros(ids.shape)
    for row, c in zip(loss_mask, conversations, strict=True):
        row[: len(c.tokens)] = (c.labels != -100).float()
    keywords = {"input_ids": ids, "attention_mask": mask, "position_ids": None}
    keywords |= {"labels": labels, "loss_mask": loss_mask}
    return Call((), {**call.keywords, **keywords}, call.labels, call.owner, call.rows, losses=True)


def verl_mtp(conversations: Conversations, layout: Layout) -> Call:
    """verl 0.9.1 with MTP: on the last stage also labels, a loss mask and positions, packed as the output is."""
    call = verl_thd(conversations, layout)
    bounds, mine = segments_of(conversations, layout)
    more: dict[str, Any] = {}
    if parallel_state.is_pipeline_last_stage():
        # At the end of a segment verl's labels begin again at its first token.
        labels = torch.tensor([mine(0, 0)])
        for start, end in pairwise(bounds.tolist()):
            labels[0, start:end] = labels[0, start:end].roll(-1)
        more["labels"] = torch.where(call.labels[None] == -100, labels, call.labels)
        more["loss_mask"] = (call.labels[None] != -100).float()
    positions = torch.cat([torch.arange(int(size)) for size in bounds.diff()])
    return Call((), {**call.keywords, **more, "position_ids": positions[None]}, call.labels, call.owner)


def verl_fused(conversations: Conversations, layout: Layout) -> Call:
    """verl 0.9.1, `model_forward_fused.py`, hook mode: labels of this rank's part, and a function for the output."""
    call = verl_thd(conversations, layout)
    context = {"temperature": 1.0}
    more = {"output_processor": log_probs, "output_processor_context": context}
    labels = call.labels.clamp(min=0)[None]
    return Call((), {**call.keywords, **more, "labels": labels}, call.labels, call.owner)


@dataclass
class Fused:
    """What verl's processor gives."""

    log_probs: torch.Tensor


def log_probs(
    *, hidden_states: Any, output_layer: Any, output_weight: Any, labels: Any, context: Any, config: Any, **rest: Any
) -> Fused:
    """Of the labels, as verl's fused kernel takes its arguments."""
    assert rest.keys() >= {"packed_seq_params", "input_ids", "attention_mask", "compute_language_model_loss"}
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
    weight = output_layer.weight if output_weight is None else output_weight
    logits = hidden_states @ weight.T / context["temperature"]
    assert rest["scale_logits"](logits) is logits
    return Fused(-tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.T)[:, 0][None])


CALLS = {c.__name__: c for c in (verl_thd, roll, nemo_rl, slime, verl_bshd, sky_rl, megatron_bridge)}
OTHERS = {c.__name__: c for c in (verl_mtp, verl_fused, miles, areal)}


def token_losses(output: Any, call: Call) -> torch.Tensor:
    """The losses of the output's tokens, 0 where they have no label, as a framework takes them from logits."""
    supervised = call.labels != -100
    if isinstance(output, Fused):
        return -output.log_probs.flatten() * supervised
    shape = (call.rows, len(call.owner) // call.rows)
    if isinstance(output, tuple):
        losses, mask = output
        assert losses.shape == mask.shape == shape
        assert torch.equal(mask.flatten() != 0, supervised)
        return losses.flatten() * mask.flatten()
    assert output.shape[:2] == shape
    if call.losses:
        return output.flatten() * supervised
    assert output.dim() == 3
    assert bool(output.isfinite().all())
    logits, labels = output.flatten(0, 1)[:, None], call.labels.clamp(min=0)[:, None]
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)[:, 0] * supervised


def run(
    layout: Layout,
    folder: Path,
    name: str,
    conversations: Conversations,
    logits_with_labels: bool = False,
    mean: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A training step with the call of this name: token losses, which tokens they are of, and gradient shards.

    `mean`: the loss function averages, as a framework without `calculate_per_token_loss`.
    """
    if layout.pp > 1:
        options = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"} | options
    chunks = ranks.build_chunks(layout, folder, **options)
    for chunk in chunks:
        chunk.logits_with_labels = logits_with_labels
        chunk.config.calculate_per_token_loss = not mean
        check_layout(chunk.config, chunk.hf_config, own_loss=mean)
    wrapped = [DistributedDataParallel(x.config, DistributedDataParallelConfig(), x) for x in chunks]
    return train(layout, wrapped, name, conversations, mean)


def train(
    layout: Layout, wrapped: Sequence[Any], name: str, conversations: Conversations, mean: bool = False
) -> dict[str, Any]:
    """The training step of `run`, with these chunks in DDP."""
    chunks = modules_of(wrapped)
    chunks[0].config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    call, found = (CALLS | OTHERS)[name](conversations, layout), []

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        output = model(*call.arguments, **call.keywords)
        if not get_attr_wrapped_model(model, "post_process"):
            return output, None
        losses = token_losses(output, call)
        found.append((losses.detach().clone(), call.owner))
        if mean:
            supervised = sum(int((c.labels != -100).sum()) for c in conversations)
            return losses, lambda x: (x.sum() / supervised, {"loss": x.sum().detach()})
        count = (call.labels != -100).sum().int()
        return losses, lambda x: (x.sum(), count, {"loss": x.sum().detach()})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=list(wrapped),
        # The same one for each rank of an interleaved schedule, which needs as many.
        num_microbatches=layout.pp if layout.vpp > 1 else 1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = [shard for chunk in chunks for shard in ranks.gradient_shards(chunk)]
    return {"found": found, "gradients": gradients, "tp_rank": parallel_state.get_tensor_model_parallel_rank()}


def value_weight(hidden_size: int) -> torch.Tensor:
    """The head of a critic, `[1, H]`."""
    return torch.linspace(-1, 1, hidden_size)[None]


class ValueHead(torch.nn.Linear):
    """As verl's `LinearForLastLayer`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, 1, bias=False)
        self.sequence_parallel = config.sequence_parallel
        self.weight.data = value_weight(config.hidden_size)

    def forward(self, hidden_states: Any, weight: Any = None, runtime_gather_output: Any = None) -> Any:
        values = super().forward(hidden_states).float()
        if self.sequence_parallel:
            values = tensor_parallel.gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def critic(layout: Layout, folder: Path, conversations: Conversations) -> dict[str, Any]:
    """The values of all tokens (last stage), where the head was set on the outer model; the weights come after it."""
    options = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"} if layout.pp > 1 else {}
    model, errors = ranks.build_model(layout, folder, load=False, **options), []
    for value_head in (True, False, True):
        # First with the head of a language model, then with that of a critic.
        try:
            load_hf_weights(model, folder, value_head=value_head)
        except VLBridgeError as error:
            errors.append(str(error))
        if model.post_process:
            model.output_layer = ValueHead(model.config)
    return {
        "values": critic_values(layout, model, conversations),
        "errors": errors,
        "heads": [name for name, _ in model.named_parameters() if "output_layer" in name],
        "same_decoder": model.decoder is model.language_model.decoder,
    }


def critic_values(layout: Layout, model: torch.nn.Module, conversations: Conversations) -> list[torch.Tensor]:
    """The values of all tokens, on the last stage."""
    call, values = verl_thd(conversations, layout), []

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        output = model(**call.keywords)
        if get_attr_wrapped_model(model, "post_process"):
            values.append(output[0, call.owner >= 0])
        return output, lambda x: (x.sum(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
    )
    return values


REFUSED = (
    "context-parallel rank 1: attention_mask has 3 rows, but cu_seqlens has 4 segments",
    "context-parallel rank 1: attention_mask, row 0: it keeps",
    "context-parallel rank 1: mm_token_type_ids: expected 1 at image placeholders",
    "context-parallel rank 1: output_processor gets the hidden states of a packed batch",
    "ok",
)


def refusals(layout: Layout, folder: Path, conversations: Conversations) -> list[str]:
    """The errors of calls of which the second rank's is wrong, and then of one that is right."""
    model = ranks.build_model(layout, folder, load=False)
    good = dict(verl_thd(conversations, layout).keywords)
    ids, mask = good["input_ids"], good["attention_mask"]
    bounds = torch.tensor([0, 4, 8, 12, 16], dtype=torch.int32)
    faults: list[dict[str, Any]] = [
        {"input_ids": ids[:3], "attention_mask": mask[:3]},
        {"packed_seq_params": PackedSeqParams(cu_seqlens_q=bounds)},
        {"mm_token_type_ids": torch.zeros_like(ids)},
        {"packed_seq_params": None, "output_processor": log_probs},
        {},
    ]
    found = []
    for fault in faults:
        mine = good | (fault if parallel_state.get_context_parallel_rank() else {})
        try:
            model(**mine)
            found.append("ok")
        except VLBridgeError as error:
            found.append(str(error))
    return found
