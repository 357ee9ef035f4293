"""The CPU's reference kernels equal loops over tokens, and the CPU runtime refuses what it would hide."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from megatron_vlbridge.backends import gloo
from megatron_vlbridge.backends.cpu import CpuSpecProvider, PackedAttention, reference_norm
from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.errors import VLBridgeError
from tests.closeness import assert_close_in_norm, norm

CPU = torch.device("cpu")


def config(**fields: object) -> TransformerConfig:
    return TransformerConfig(
        **{"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "attention_dropout": 0.0} | fields
    )


def attention(softmax_scale: float | None = None, **fields: object) -> PackedAttention:
    return PackedAttention(config(**fields), 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def token_by_token(query, key, value, lengths, causal, scale=None):
    """Softmax attention of each token and head, in fp64, over the tokens of its own segment that it may see."""
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for length in lengths:
        for token in range(start, start + length):
            seen = range(start, token + 1 if causal else start + length)
            heads = []
            for head in range(query.shape[1]):
                scores = torch.stack([query[token, head] @ key[other, head // shared] for other in seen]) * scale
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * value[other, head // shared] for w, other in zip(weights, seen, strict=True)))
            rows.append(torch.cat(heads))
        start += length
    return torch.stack(rows)


def heads_of(tokens: int, groups: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, count, 4, generator=random, requires_grad=True) for count in (4, groups, groups)]


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**32 - 1),
)
def test_packed_attention_and_its_gradients_equal_a_loop(lengths, groups, causal, scale, seed):
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    qkv = heads_of(sum(lengths), groups, seed)
    found = attention(scale)(*qkv, None, kind, packed_seq_params=PackedSegments.from_lengths(lengths, CPU))
    expected = token_by_token(*qkv, lengths, causal, scale)
    assert found.shape == (sum(lengths), 16)
    assert_close_in_norm(found, expected, 1e-6)

    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = torch.autograd.grad(found, qkv, upstream), torch.autograd.grad(expected, qkv, upstream.double())
    # A token that sees itself alone weighs it by one, whatever the query and the key.
    scales = [norm(*theirs) if max(lengths) == 1 else None] * 2 + [None]
    for gradient, wanted, size in zip(mine, theirs, scales, strict=True):
        assert_close_in_norm(gradient, wanted, scale=size)


@pytest.mark.parametrize("kind", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_nothing_leaks_between_segments(kind):
    lengths, changed = (3, 3, 1, 4), 1
    qkv = heads_of(11, 2)
    other = [x.detach().clone() for x in qkv]
    for x in other:
        x[3:6] = torch.randn_like(x[3:6]) * 100
    packed = PackedSegments.from_lengths(lengths, CPU)
    before, after = (attention()(*x, None, kind, packed_seq_params=packed).split(lengths) for x in (qkv, other))
    for segment, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (segment != changed)


def test_attention_rejects_what_it_cannot_do():
    qkv, packed = heads_of(4, 2), PackedSegments.from_lengths([4], CPU)
    causal = AttnMaskType.causal
    with pytest.raises(VLBridgeError, match="takes a pack"):
        attention()(*qkv, None, causal)
    with pytest.raises(VLBridgeError, match="no mask and no bias"):
        attention()(*qkv, torch.ones(1, 1, 4, 4), causal, packed_seq_params=packed)
    with pytest.raises(VLBridgeError, match="no mask and no bias"):
        attention()(*qkv, None, causal, attention_bias=torch.ones(1), packed_seq_params=packed)
    with pytest.raises(VLBridgeError, match="padding"):
        attention()(*qkv, None, AttnMaskType.padding, packed_seq_params=packed)
    with pytest.raises(VLBridgeError, match="segments hold 5 tokens, the pack 4"):
        attention()(*qkv, None, causal, packed_seq_params=PackedSegments.from_lengths([4, 1], CPU))
    with pytest.raises(VLBridgeError, match=r"attention_dropout must be 0, found 0\.1"):
        attention(attention_dropout=0.1)


def test_rms_norm_equals_its_formula():
    layer = reference_norm(config(normalization="RMSNorm"), 8, eps=1e-3)
    layer.weight.data = torch.arange(1.0, 9.0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = [[v / (sum(u * u for u in row) / 8 + 1e-3) ** 0.5 * (i + 1) for i, v in enumerate(row)] for row in x]
    assert_close_in_norm(layer(x), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zero_centered_rms_norm_equals_transformers(dtype):
    layer = reference_norm(config(normalization="RMSNorm", layernorm_zero_centered_gamma=True), 8, eps=1e-3)
    layer.weight.data = torch.linspace(-0.9, 0.9, 8, dtype=dtype)
    expected = Qwen3_5RMSNorm(8, eps=1e-3)
    expected.weight.data = layer.weight.data
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert layer(x).dtype == dtype
    # In bf16 one of the last of 8 bits may differ.
    assert_close_in_norm(layer(x).float(), expected(x).float(), 1e-6 if dtype == torch.float32 else 2e-3)


def test_layer_norm_equals_its_formula():
    layer = reference_norm(config(normalization="LayerNorm"), 8, eps=1e-3)
    layer.weight.data, layer.bias.data = torch.arange(1.0, 9.0), torch.arange(8.0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    centred = x - x.sum(1, keepdim=True) / 8
    scaled = centred / ((centred**2).sum(1, keepdim=True) / 8 + 1e-3) ** 0.5
    assert_close_in_norm(layer(x), scaled * torch.arange(1.0, 9.0) + torch.arange(8.0), 1e-6)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norms_are_marked_for_sequence_parallelism_and_keep_the_dtype(normalization, sequence_parallel):
    made = config(
        normalization=normalization,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=2,
        params_dtype=torch.bfloat16,
    )
    parameters = list(CpuSpecProvider().layer_norm()(config=made, hidden_size=8).parameters())
    assert len(parameters) == (1 if normalization == "RMSNorm" else 2)
    assert all(p.sequence_parallel is sequence_parallel for p in parameters)
    assert all(p.dtype == torch.bfloat16 for p in parameters)


@pytest.mark.parametrize(("normalization", "zero_centered"), [("L2Norm", False), ("LayerNorm", True)])
def test_other_norms_are_rejected(normalization, zero_centered):
    made = config()
    made.normalization, made.layernorm_zero_centered_gamma = normalization, zero_centered
    with pytest.raises(
        VLBridgeError, match=rf"\('{normalization}', {zero_centered}\); supported: \('RMSNorm', False\)"
    ):
        reference_norm(made, 8)


def test_packed_segments_agree_with_their_tensors():
    packed = PackedSegments.from_lengths([3, 1, 2], CPU)
    assert packed.segments == (3, 1, 2)
    assert packed.qkv_format == "thd"
    for cu_seqlens in (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.cu_seqlens_q_padded):
        assert cu_seqlens.tolist() == [0, 3, 4, 6]
        assert cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 3


def in_a_new_process(program: str) -> str:
    """What the last line of output of `program` is."""
    start = "import torch\nfrom megatron_vlbridge.backends import cpu_runtime\n"
    end = "\ntry:\n    cpu_runtime.enable()\nexcept ValueError as error:\n    print(type(error).__name__, error)\n"
    command = [sys.executable, "-W", "ignore", "-c", start + program + end]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_runtime_does_not_hide_a_gpu():
    program = "torch.cuda.is_available = lambda: True\ntorch.cuda.device_count = lambda: 3\nbefore = torch.compile"
    answer = in_a_new_process(program)
    assert answer.startswith("VLBridgeError cpu_runtime.enable() would hide 3 visible GPU(s).")
    assert "CUDA_VISIBLE_DEVICES" in answer


def test_runtime_does_not_start_after_megatron():
    answer = in_a_new_process("import megatron.core")
    assert answer.startswith("VLBridgeError cpu_runtime.enable() was called after megatron.core had been imported")


def test_runtime_turns_cuda_calls_into_cpu_calls_and_can_be_enabled_twice():
    program = """
cpu_runtime.enable()
assert cpu_runtime.is_enabled()
x = torch.zeros(2, device="cuda")
assert x.device.type == x.cuda().device.type == x.to("cuda:0").device.type == "cpu"
assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.int32).dtype == torch.int32
assert torch.compile(len) is len and torch.compile()(len) is len
torch.cuda.manual_seed(7)
state, first = torch.cuda.get_rng_state(), torch.rand(3)
torch.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
print("fine")
"""
    assert in_a_new_process(program) == "fine"


def test_threads_of_gloo_do_not_preempt_ranks(tmp_path: Path):
    program = f"""
import os
cpu_runtime.enable()
before = set(os.listdir("/proc/self/task"))
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
started = set(os.listdir("/proc/self/task")) - before
assert len(started) >= 2, started
assert all(os.sched_getscheduler(int(task)) == os.SCHED_BATCH for task in started)
torch.distributed.destroy_process_group()
print("fine")
"""
    assert in_a_new_process(program) == "fine"


def test_a_scheduling_policy_that_the_user_chose_is_kept():
    found = []

    def choose():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        gloo.set_batch_scheduling()
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=choose)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE]
