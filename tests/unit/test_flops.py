"""The formula of model FLOPs against torch's counter of matrix products, run on transformers' models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_vlbridge import Config, read_config
from megatron_vlbridge.config import LinearAttentionConfig
from megatron_vlbridge.config.flops import linear_attention_macs
from megatron_vlbridge.training.metrics.counts import PackCounts
from tests import mtp_layer, mtp_reference, reference

LENGTH = 128


def batch_of(*conversations: reference.Conversation, length: int = LENGTH) -> dict[str, torch.Tensor]:
    return {key: value[None] for key, value in reference.pack(conversations, length).items()}


def load(folder: Path) -> Any:
    """With attention and experts as plain matrix products, which the counter sees."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def counted(model: torch.nn.Module, run: Any) -> int:
    """The products that torch sees, without those by which transformers computes the angles of rotations."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    angles = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


def square(counts: PackCounts) -> PackCounts:
    """Of one conversation, with attention to all tokens, as transformers computes it before it masks."""
    return replace(counts, token_pairs=counts.tokens**2)


def unseen(config: Config, tokens: int) -> int:
    """What the counter sees of linear attention layers less what the formula has: the delta rule, a longer convolution.

    transformers multiplies states elementwise, and convolves the kernel's padding, of which it drops the result.
    """
    linear = config.text.linear_attention
    if linear is None:
        return 0
    layers = linear.layer_types.count("linear_attention")
    channels = 2 * linear.num_key_heads * linear.key_head_dim + linear.num_value_heads * linear.value_head_dim
    kernel = linear.conv_kernel_dim
    return layers * (2 * channels * kernel * (kernel - 1) - tokens * delta_rule(linear))


def delta_rule(linear: LinearAttentionConfig) -> int:
    """The products of the delta rule for one token, run as matrix products under torch's counter."""
    state = torch.zeros(linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
    key = torch.ones(linear.num_value_heads, linear.key_head_dim, 1)
    with FlopCounterMode(display=False) as counter:
        read = key.transpose(1, 2) @ state
        state = state + key @ (1 - read)
        key.transpose(1, 2) @ state
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", reference.KINDS)
def test_forward_flops_are_those_that_torch_counts(tmp_path: Path, kind: str) -> None:
    folder = reference.write_checkpoint(tmp_path, **reference.KINDS[kind])
    config, model = read_config(folder), load(folder)
    with reference.recurrent_delta_rule():
        for name in ("mixed", "text"):
            c = reference.conversation(name, 3)
            counts = square(PackCounts.of(batch_of(c)))
            expected = counts.forward_flops(config)
            found = counted(model, lambda c=c: model(**reference.model_inputs(c)))
            assert found == expected + unseen(config, len(c.tokens))


@pytest.mark.parametrize("kind", ["dense", "linear-experts"])
def test_an_mtp_layer_adds_what_torch_counts(tmp_path: Path, kind: str) -> None:
    """transformers runs it on all tokens but the last."""
    folder = mtp_reference.write_mtp_checkpoint(tmp_path, **reference.KINDS[kind])
    config, model, c = read_config(folder), load(folder), reference.conversation("text", 4)
    layer = mtp_layer.build(model)
    mtp_layer.load(layer, load_file(folder / mtp_reference.FILE))
    both = torch.nn.ModuleList([model, layer])
    with reference.recurrent_delta_rule():
        alone = counted(model, lambda: model(**reference.model_inputs(c)))
        found = counted(both, lambda: mtp_reference._run(model, layer, c))
    shorter = square(replace(PackCounts.of(batch_of(c)), tokens=len(c.tokens) - 1))
    without = replace(config, text=replace(config.text, num_mtp_layers=0))
    assert found - alone == shorter.forward_flops(config) - shorter.forward_flops(without)


def test_a_shared_expert_and_layers_without_experts_are_counted(tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path, experts={"mlp_only_layers": [1]})
    config, model, c = read_config(folder), load(folder), reference.conversation("text", 5)
    expected = square(PackCounts.of(batch_of(c))).forward_flops(config)
    assert counted(model, lambda: model(**reference.model_inputs(c))) == expected


def test_counts_of_a_pack_equal_those_counted_one_by_one(tmp_path: Path) -> None:
    conversations = [reference.conversation(kind, 7) for kind in ("mixed", "text", "images", "video")]
    batch = batch_of(*conversations, length=160)
    counts = PackCounts.of(batch) + PackCounts.of(batch_of(conversations[1]))
    both = [*conversations, conversations[1]]
    frames = [(c, t, h, w) for c in both for grids in (c.image_grids, c.video_grids) for t, h, w in grids.tolist()]
    sizes = [h * w for _, t, h, w in frames for _ in range(t)]
    assert counts == PackCounts(
        packs=2,
        length=160 + LENGTH,
        tokens=sum(len(c.tokens) for c in both),
        supervised_tokens=sum(label != -100 for c in both for label in c.labels.tolist()),
        images=sum(len(c.image_grids) for c in both),
        videos=sum(len(c.video_grids) for c in both),
        patches=sum(len(c.images) + len(c.videos) for c in both),
        token_pairs=sum(int(torch.ones(len(c.tokens), len(c.tokens)).tril().sum()) for c in both),
        patch_pairs=sum(int(torch.ones(size, size).sum()) for size in sizes),
    )
    assert counts.padding_share == 1 - counts.tokens / counts.length
    assert PackCounts().padding_share == 0


def test_training_takes_three_times_the_forward(tmp_path: Path) -> None:
    config = read_config(reference.write_checkpoint(tmp_path))
    counts = PackCounts.of(batch_of(reference.conversation("mixed", 3)))
    forward = counts.forward_flops(config)
    assert counts.training_flops(config) == 3 * forward
    assert (counts + counts).training_flops(config) == 6 * forward
    assert isinstance(forward, int)


def test_linear_attention_takes_its_weights_and_three_products_with_its_state() -> None:
    linear = LinearAttentionConfig(("linear_attention",), 4, 128, 128, 16, 32)
    weights = 2048 * (2 * 16 * 128 + 3 * 32 * 128 + 2 * 32) + 4 * (2 * 16 * 128 + 32 * 128)
    assert linear_attention_macs(2048, linear) == weights + 3 * 32 * 128 * 128
