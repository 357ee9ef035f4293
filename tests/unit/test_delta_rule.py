"""The CPU kernels of gated delta net layers against fp64 loops over tokens, and the separation of segments."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlbridge.backends.delta_rule import causal_conv1d, chunk_gated_delta_rule, l2norm
from tests.closeness import assert_close_in_norm
from tests.errors import rejects

LENGTHS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 200)
# Every length, a token alone, each side of a chunk alone, and random packs.
PACKS = [list(LENGTHS), [1], [2], [64], [65], [1, 1, 1, 64, 1]]
PACKS += [random.Random(seed).choices(LENGTHS, k=random.Random(seed).randint(2, 6)) for seed in range(6)]
# Of A_log, from a decay that forgets in a token to one that keeps a segment.
DECAYS = {"strong": (-1.0, 2.77), "slow": (-7.0, -4.0)}
KEYS, VALUES, WIDTH = 8, 12, 4
# Measured: at most 1.0e-6, and 2.5e-6 for what is a sum of terms that cancel; transformers' chunked rule: up to 1e-2.
# Which products a processor rounds differs.
BOUND, BOUND_OF_SUMS = 2e-6, 5e-6
SUMS = ("beta", "A_log", "dt_bias")


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make_inputs(tokens: int, decay: str, key_heads: int = 2, repeat: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """What a layer computes the arguments of the rule from, in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads, (low, high) = key_heads * repeat, DECAYS[decay]
    return {
        "q": normal(1, tokens, key_heads, KEYS),
        "k": normal(1, tokens, key_heads, KEYS),
        "v": normal(1, tokens, heads, VALUES),
        "alpha": normal(1, tokens, heads),
        "beta": normal(1, tokens, heads),
        "A_log": torch.rand(heads, generator=generator) * (high - low) + low,
        "dt_bias": normal(heads) + 1,
    }


def through_the_rule(rule: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The rule after the layer's norm of q and k, repeated heads, sigmoid and decay."""
    heads = inputs["v"].shape[2] // inputs["q"].shape[2]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (inputs["q"], inputs["k"]))
    q, k = (x.repeat_interleave(heads, dim=2) for x in (q, k))
    g = -inputs["A_log"].exp() * softplus(inputs["alpha"] + inputs["dt_bias"])
    return rule(q, k, inputs["v"], g, inputs["beta"].sigmoid())


def recurrence(lengths: list[int]) -> Callable[..., Tensor]:
    """The definition: token by token, each segment from a state of zero."""

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        outputs = []
        for segment in zip(*(x[0].split(lengths) for x in (q, k, v, g, beta)), strict=True):
            state = torch.zeros(v.shape[2], q.shape[3], v.shape[3], dtype=q.dtype)
            for q_t, k_t, v_t, g_t, beta_t in zip(*segment, strict=True):
                state = state * g_t.exp()[:, None, None]
                error = v_t - (state * k_t[:, :, None]).sum(1)
                state = state + k_t[:, :, None] * (beta_t[:, None] * error)[:, None]
                outputs.append((state * q_t[:, :, None]).sum(1) / q.shape[3] ** 0.5)
        return torch.stack(outputs)[None]

    return rule


def packed(lengths: list[int]) -> Callable[..., Tensor]:
    return lambda q, k, v, g, beta: call({"q": q, "k": k, "v": v, "g": g, "beta": beta}, cu_seqlens_of(lengths))


def with_gradients(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of a random weighting of it with respect to all inputs, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_equals_the_reference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in found:
        assert_close_in_norm(found[name], expected[name], bound=BOUND_OF_SUMS if name in SUMS else BOUND)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pack", range(len(PACKS)))
def test_the_rule_equals_the_recurrence_in_fp64(pack: int, decay: str) -> None:
    lengths = PACKS[pack]
    inputs = make_inputs(sum(lengths), decay, repeat=1 + pack % 4, seed=pack)
    found = with_gradients(lambda x: through_the_rule(packed(lengths), x), inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    assert_equals_the_reference(found, with_gradients(lambda x: through_the_rule(recurrence(lengths), x), wide))


def arguments(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of the rule itself, with two heads and a slow decay, so that a state would survive many segments."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"q": (2, KEYS), "k": (2, KEYS), "v": (2, VALUES), "g": (2,), "beta": (2,)}
    made = {name: torch.randn(batch, tokens, *shape, generator=generator) for name, shape in shapes.items()}
    made |= {name: torch.nn.functional.normalize(made[name], dim=-1) for name in ("q", "k")}
    made |= {"g": -0.01 * made["g"].abs(), "beta": made["beta"].sigmoid()}
    return {name: x.to(dtype) for name, x in made.items()}


def call(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    return chunk_gated_delta_rule(**inputs, cu_seqlens=cu_seqlens)[0]


@pytest.mark.parametrize("tokens", [1, 31, 64, 130])
def test_without_cu_seqlens_each_sequence_of_the_batch_is_a_segment(tokens: int) -> None:
    def reference(inputs: dict[str, Tensor]) -> Tensor:
        rows = zip(*(x.split(1) for x in inputs.values()), strict=True)
        return torch.cat([recurrence([tokens])(*row) for row in rows])

    inputs = arguments(tokens, batch=3)
    wide = {name: x.double() for name, x in inputs.items()}
    assert_equals_the_reference(with_gradients(call, inputs), with_gradients(reference, wide))


def test_the_rule_computes_in_fp32() -> None:
    lengths = [1, 40, 64, 7]
    inputs = arguments(sum(lengths), dtype=torch.bfloat16)
    found = with_gradients(lambda x: call(x, cu_seqlens_of(lengths)), inputs)
    expected = with_gradients(
        lambda x: call({name: part.float() for name, part in x.items()}, cu_seqlens_of(lengths)).bfloat16(), inputs
    )
    for name in found:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], expected[name]), name


# Boundaries inside of chunks and at their ends, tokens alone.
SEGMENTS = [37, 3, 70, 64, 1, 5, 32]
BOUNDS = [0, *itertools.accumulate(SEGMENTS)]


def conv_inputs(
    tokens: int, width: int = WIDTH, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"x": (batch, tokens, 6), "weight": (6, width), "bias": (6,)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def convolve(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    return causal_conv1d(**inputs, activation="silu", cu_seqlens=cu_seqlens)[0]


KERNELS = {"rule": (call, arguments), "convolution": (convolve, conv_inputs)}


@pytest.mark.parametrize("changed", range(len(SEGMENTS)))
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_segment_changes_no_bit_of_another(kernel: str, changed: int) -> None:
    function, make = KERNELS[kernel]
    tokens = slice(BOUNDS[changed], BOUNDS[changed + 1])
    inputs = {name: x for name, x in make(BOUNDS[-1]).items() if name != "bias"}
    moved = {name: x.clone() for name, x in inputs.items()}
    weights = torch.randn(function(inputs).shape, generator=torch.Generator().manual_seed(1))
    for name, x in moved.items():
        if name != "weight":
            x[:, tokens] = 0.5 * x[:, tokens]

    results = []
    for values in (inputs, moved):
        leaves = {name: x.requires_grad_() for name, x in values.items()}
        out = function(leaves, cu_seqlens_of(SEGMENTS))
        gradients = torch.autograd.grad(out, [x for name, x in leaves.items() if name != "weight"], weights)
        results.append([out, *gradients])
    others = torch.ones(BOUNDS[-1], dtype=torch.bool)
    others[tokens] = False
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, others], after[:, others])
    assert any(not torch.equal(before[:, tokens], after[:, tokens]) for before, after in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_a_segment_is_zero_in_others(kernel: str) -> None:
    function, make = KERNELS[kernel]
    inputs = {name: x.requires_grad_() for name, x in make(BOUNDS[-1]).items()}
    out = function(inputs, cu_seqlens_of(SEGMENTS))
    by_token = [x for name, x in inputs.items() if name not in ("weight", "bias")]
    for begin, end in itertools.pairwise(BOUNDS):
        for gradient in torch.autograd.grad(out[:, begin:end].square().sum(), by_token, retain_graph=True):
            assert gradient[:, begin:end].any() or end - begin == 1
            gradient[:, begin:end] = 0
            assert not gradient.any()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [[1], [3], [5], [1, 2, 3, 4, 5, 70, 1], [8, 8]], ids=str)
def test_the_convolution_equals_torchs_for_each_segment(lengths: list[int], bias: bool, width: int) -> None:
    inputs = conv_inputs(sum(lengths), width)
    if not bias:
        del inputs["bias"]

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        parts = [torch.nn.functional.pad(x, (width - 1, 0)) for x in inputs["x"].mT.split(lengths, dim=2)]
        weight = inputs["weight"][:, None]
        return silu(torch.cat([conv1d(x, weight, inputs.get("bias"), groups=6) for x in parts], dim=2)).mT

    found = with_gradients(lambda x: convolve(x, cu_seqlens_of(lengths)), inputs)
    expected = with_gradients(reference, {name: x.double() for name, x in inputs.items()})
    for name in found:
        assert_close_in_norm(found[name], expected[name], bound=4e-7)  # measured: at most 2e-7


def test_the_convolution_computes_in_fp32_and_takes_a_batch() -> None:
    inputs = conv_inputs(9, batch=2, dtype=torch.bfloat16)
    found = with_gradients(convolve, inputs)
    expected = with_gradients(lambda x: convolve({name: part.float() for name, part in x.items()}).bfloat16(), inputs)
    for name in found:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], expected[name]), name
    for row in range(2):
        alone = convolve(inputs | {"x": inputs["x"][row : row + 1]}, cu_seqlens_of([9]))
        assert torch.equal(found["out"][row : row + 1], alone)


def test_the_norm_is_that_of_the_last_dimension() -> None:
    # Down to where the epsilon counts.
    sizes = torch.tensor([1, 1e-2, 1e-3, 1e-4, 0])[:, None]
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * sizes

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        return inputs["x"] / (inputs["x"].square().sum(-1, keepdim=True) + 1e-6).sqrt()

    found = with_gradients(lambda inputs: l2norm(inputs["x"]), {"x": x})
    expected = with_gradients(reference, {"x": x.double()})
    for row in range(5):
        for name in found:
            assert_close_in_norm(found[name][row], expected[name][row], bound=4e-7)
    assert torch.equal(l2norm(x.bfloat16()), l2norm(x.bfloat16().float()).bfloat16())


class Operations(TorchDispatchMode):
    """Records the operations under it and the number of elements that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.elements += sum(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out


def run(kernel: str, lengths: list[int], device: str = "cpu") -> Operations:
    """Forward and backward of a kernel over a pack."""
    function, make = KERNELS[kernel]
    inputs = {name: x.to(device).requires_grad_() for name, x in make(sum(lengths)).items()}
    cu_seqlens = cu_seqlens_of(lengths).to(device)
    with Operations() as operations:
        out = function(inputs, cu_seqlens)
        gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert out.shape[:2] == (1, sum(lengths))
    assert [x.shape for x in gradients] == [x.shape for x in inputs.values()]
    return operations


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_read_on_the_host(kernel: str) -> None:
    on_the_cpu, on_meta = run(kernel, [70, 1, 30]), run(kernel, [70, 1, 30], "meta")
    reads = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "unique", "masked_select"}
    assert reads.isdisjoint(on_the_cpu.names)
    # The operations, and so their shapes, depend on the number of segments only.
    assert on_meta.names == on_the_cpu.names == run(kernel, [33, 33, 35]).names


def held_for_backward(kernel: str, lengths: list[int]) -> int:
    """Elements of the tensors that autograd keeps, of each storage once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    function, make = KERNELS[kernel]
    inputs = {name: x.requires_grad_() for name, x in make(sum(lengths)).items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = function(inputs, cu_seqlens_of(lengths))
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_and_work_are_linear_in_tokens(kernel: str) -> None:
    lengths = [200, 56] * 4
    assert held_for_backward(kernel, lengths * 2) < 2.05 * held_for_backward(kernel, lengths)
    assert run(kernel, lengths * 2, "meta").elements < 2.05 * run(kernel, lengths, "meta").elements


def test_other_arguments_are_rejected() -> None:
    rule, conv = arguments(4), conv_inputs(4)
    state = torch.zeros(1, 2, KEYS, VALUES)
    with rejects("chunk_gated_delta_rule: initial_state must be None or False"):
        chunk_gated_delta_rule(**rule, initial_state=state)
    with rejects("output_final_state must be None or False"):
        chunk_gated_delta_rule(**rule, output_final_state=True)
    with rejects("use_qk_l2norm_in_kernel must be None or False"):
        chunk_gated_delta_rule(**rule, use_qk_l2norm_in_kernel=True)
    with rejects("causal_conv1d: initial_state must be None or False"):
        causal_conv1d(**conv, activation="silu", initial_state=state)
    for activation in ("gelu", None):
        with rejects(f"activation must be 'silu' or 'swish', found {activation!r}"):
            causal_conv1d(**conv, activation=activation)
