"""The oracle for multi-token prediction: transformers' MTP layer after its model, conversation by conversation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import mtp_layer, reference
from tests.reference import Conversation, Reference, digest, model_inputs, token_losses, tower_outputs, write_checkpoint

FILE = "model-mtp.safetensors"


def write_mtp_checkpoint(folder: Path, *, mtp_experts: str = "fused_out_in", **options: Any) -> Path:
    """A tiny random checkpoint whose config and tensors have an MTP layer, in a shard of its own.

    `options` are those of `write_checkpoint`; `mtp_experts` is the form of this layer's experts.
    """
    return add_prediction_layer(write_checkpoint(folder, **options), mtp_experts)


def add_prediction_layer(folder: Path, mtp_experts: str = "fused_out_in") -> Path:
    """Give a checkpoint a random MTP layer."""
    from transformers import AutoModelForImageTextToText

    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["text_config"]["mtp_num_hidden_layers"] = 1
    file.write_text(json.dumps(content, indent=2))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(101)
    found = mtp_layer.parameters(mtp_layer.build(model))
    with torch.no_grad():
        for parameter in found.values():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {name: x for key, value in found.items() for name, x in _as_form(key, value.detach(), mtp_experts)}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        save_file(load_file(single) | tensors, single, metadata={"format": "pt"})
        return folder
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, FILE)
    content["metadata"]["total_size"] += sum(x.nbytes for x in tensors.values())
    index.write_text(json.dumps(content, indent=2))
    return folder


@dataclass(frozen=True)
class MtpReference:
    """The whole model's `Reference`, and of each conversation what the MTP layer gives.

    `logits` `[S - 1, V]` and `losses` `[S - 1]` are for the token after the next one, of all tokens but the last.
    """

    main: Reference
    logits: list[torch.Tensor]
    losses: list[torch.Tensor]


_CACHE: dict[tuple[Path, bytes, torch.dtype], MtpReference] = {}


def run_transformers(
    folder: Path, groups: Sequence[Sequence[Conversation]], dtype: torch.dtype = torch.float32
) -> MtpReference:
    """Forward and backward of each conversation alone; run once for the same checkpoint and groups."""
    key = folder, b"".join(digest(group) for group in groups), dtype
    if key not in _CACHE:
        _CACHE[key] = _run_transformers(folder, groups, dtype)
    return _CACHE[key]


@reference.recurrent_delta_rule()
def _run_transformers(
    folder: Path, groups: Sequence[Sequence[Conversation]], dtype: torch.dtype, scaling: float = 0.1
) -> MtpReference:
    """Forward and backward.

    The loss that is derived is the main loss, and `scaling` times the mean loss of the MTP layer over each
    group, which weighs as much as the group's main loss: `sum_groups(n / m * losses) / N`, with `n` and `m` the
    supervised tokens of a group in the main and in the MTP prediction, and `N` those of all groups.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).train()
    layer = mtp_layer.build(model).to(dtype).train()
    mtp_layer.load(layer, load_file(folder / FILE))
    conversations = [c for group in groups for c in group]
    outputs = [_run(model, layer, c) for c in conversations]
    supervised = sum(int((c.labels != -100).sum()) for c in conversations)
    loss = torch.cat([losses for _, losses, _, _ in outputs]).sum() / supervised
    total, rest = loss, iter(outputs)
    for group in groups:
        parts = torch.cat([next(rest)[3] for _ in group])
        counts = [sum(int((c.labels[first:] != -100).sum()) for c in group) for first in (0, 1)]
        total = total + scaling * counts[0] / counts[1] * parts.sum() / supervised
    total.backward()
    named = dict(model.named_parameters()) | mtp_layer.parameters(layer)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    logits, losses, mtp, mtp_losses = ([x.detach() for x in column] for column in zip(*outputs, strict=True))
    main = Reference(logits, losses, loss.item(), gradients, [tower_outputs(model, c) for c in conversations])
    return MtpReference(main, mtp, mtp_losses)


def _run(model: Any, layer: torch.nn.Module, c: Conversation) -> tuple[torch.Tensor, ...]:
    """Logits and token losses, and those of the MTP layer."""
    rotary: list[tuple[torch.Tensor, torch.Tensor]] = []
    language = model.model.language_model
    hook = language.rotary_emb.register_forward_hook(lambda _module, _args, output: rotary.append(output))
    hidden = model.model(**model_inputs(c))[0]
    hook.remove()
    logits = model.lm_head(hidden)[0].float()
    words = language.embed_tokens(c.tokens[None, 1:])
    table = rotary[0][0][:, :-1], rotary[0][1][:, :-1]
    mtp = model.lm_head(mtp_layer.run(layer, words, hidden[:, :-1], table))[0].float()
    return logits, token_losses(logits, c.labels), mtp, token_losses(mtp, c.labels[1:])


def _as_form(name: str, tensor: torch.Tensor, form: str) -> list[tuple[str, torch.Tensor]]:
    """A tensor as transformers holds it, with the experts' in the form asked for."""
    if ".experts." not in name or form == "fused_out_in":
        return [(name, tensor)]
    if form == "fused_in_out":
        return [(name, tensor.transpose(1, 2))]
    place, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return [
        (f"{place}.{expert}.{part}.weight", rows)
        for expert, weight in enumerate(tensor)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True)
    ]
