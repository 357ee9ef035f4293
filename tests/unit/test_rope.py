"""Rotary tables equal transformers' for text (interleaved MRoPE) and for images (rows and columns)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3VLConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs

from megatron_vlbridge.model.rope import inverse_frequencies, mrope_axes, rotary_table, rotate
from tests.closeness import assert_close_in_norm, relative_error

CPU = torch.device("cpu")
TOLERANCE = 1e-6


def text_embedding(section: list[int], theta: float) -> theirs.Qwen3VLTextRotaryEmbedding:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}
    text = {"head_dim": 2 * sum(section), "rope_parameters": rope, "hidden_size": 64, "num_attention_heads": 4}
    return theirs.Qwen3VLTextRotaryEmbedding(Qwen3VLConfig(text_config=text).text_config)


@pytest.mark.parametrize("section", [[24, 20, 20], [3, 3, 2], [4, 2, 2], [11, 11, 10], [8, 0, 0]])
@pytest.mark.parametrize("theta", [10000.0, 5000000.0])
def test_text_rotation_equals_transformers(section, theta):
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 3000, (3, 1, 17), generator=random)
    query = torch.randn(1, 4, 17, 2 * sum(section), generator=random)
    key = torch.randn(1, 2, 17, 2 * sum(section), generator=random)
    cos, sin = text_embedding(section, theta)(query, positions)
    expected = theirs.apply_rotary_pos_emb(query, key, cos, sin)

    table = rotary_table(positions[:, 0], mrope_axes(section), inverse_frequencies(sum(section), theta, CPU))
    assert table.dtype == torch.float32
    assert_close_in_norm(table[:, :, 0], torch.stack((cos[0], sin[0])), TOLERANCE)
    for heads, wanted in zip((query, key), expected, strict=True):
        found = rotate(heads[0].transpose(0, 1), table).transpose(0, 1)[None]
        assert_close_in_norm(found, wanted, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_each_head_is_rotated_as_in_transformers(dtype):
    random = torch.Generator().manual_seed(0)
    section, head_dim = [3, 3, 2], 64
    positions = torch.randint(0, 3000, (3, 1, 17), generator=random)
    heads = torch.randn(1, 4, 17, head_dim, generator=random).to(dtype)
    cos, sin = text_embedding(section, 10000.0)(heads, positions)
    expected, _ = qwen3_5.apply_rotary_pos_emb(heads.float(), heads.float(), cos.float(), sin.float())
    table = rotary_table(positions[:, 0], mrope_axes(section), inverse_frequencies(8, 10000.0, CPU))
    found = rotate(heads[0].transpose(0, 1), table).transpose(0, 1)[None]
    assert found.dtype == dtype
    assert torch.equal(found[..., 16:], heads[..., 16:])
    assert_close_in_norm(found, expected.to(dtype), TOLERANCE if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_vision_rotation_equals_transformers(head_dim):
    random = torch.Generator().manual_seed(0)
    vision = Qwen3VLConfig(vision_config={"hidden_size": 4 * head_dim, "num_heads": 4}).vision_config
    positions = torch.randint(0, 90, (2, 19), generator=random)
    heads = torch.randn(19, 4, head_dim, generator=random)
    cos, sin = theirs.Qwen3VLVisionRotaryEmbedding(vision)(heads, positions.T)
    expected, _ = theirs.apply_rotary_pos_emb_vision(heads, heads, cos, sin)

    quarter = head_dim // 4
    axes = [0] * quarter + [1] * quarter
    table = rotary_table(positions, axes, inverse_frequencies(quarter, 10000.0, CPU).repeat(2))
    assert_close_in_norm(rotate(heads, table), expected, TOLERANCE)


@given(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12)))
def test_axes_equal_what_transformers_writes_into_its_table(section):
    """Each entry of transformers' recomposed table tells which axis it came from."""
    embedding = text_embedding([1, 1, 1], 10000.0)
    embedding.mrope_section = list(section)
    marked = torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 1, sum(section))
    recomposed = embedding.recomposition_frequencies(marked)[0, 0, : sum(section)]
    assert mrope_axes(section) == recomposed.tolist()


def test_rotation_keeps_lengths_and_dtype_and_turns_by_differences_alone():
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, generator=random).unbind()
    frequencies = inverse_frequencies(8, 10000.0, CPU)

    def score(at: int, to: int) -> float:
        turned = [
            rotate(x, rotary_table(torch.full((3, 1), p), mrope_axes([3, 3, 2]), frequencies))
            for x, p in ((query, at), (key, to))
        ]
        assert_close_in_norm(turned[0].norm(), query.norm(), TOLERANCE)
        return float((turned[0] * turned[1]).sum())

    assert_close_in_norm(score(5, 3), score(105, 103))
    assert relative_error(score(5, 3), score(5, 4)) > 1e-3
    table = rotary_table(torch.tensor([[0], [0], [0]]), mrope_axes([3, 3, 2]), frequencies)
    half = query.to(torch.bfloat16)
    assert torch.equal(rotate(half, table), half)
    assert rotate(half, table).dtype == torch.bfloat16
