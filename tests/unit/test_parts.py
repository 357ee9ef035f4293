"""Which parameters belong to which part, and what the arguments of parts reject."""

import argparse
from pathlib import Path

import pytest

from megatron_vlbridge import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.parts import PARTS, part_of, parts_of
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.parser import make_parser
from megatron_vlbridge.training.launch.parts import check_part_arguments, check_resumed_parts, lr_multipliers

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
DENSE, EXPERTS = (read_config(CONFIGS / f"Qwen3-VL-{name}-Instruct.json") for name in ("2B", "30B-A3B"))
PARSER = make_parser(add_arguments)
NAMES = {
    "vision_model.patch_embed.proj.weight": "vision",
    "vision_model.pos_embed.weight": "vision",
    "vision_model.decoder.layers.0.mlp.linear_fc1.weight": "vision",
    "vision_model.merger.norm.weight": "merger",
    "vision_model.deepstack_merger_list.1.linear_fc2.bias": "merger",
    "language_model.embedding.word_embeddings.weight": "embedding",
    "language_model.decoder.layers.2.self_attention.linear_qkv.weight": "language",
    "language_model.decoder.layers.2.mlp.router.weight": "router",
    "language_model.decoder.layers.2.mlp.experts.linear_fc1.weight0": "language",
    "language_model.decoder.layers.2.mlp.shared_experts.gate_weight": "language",
    "language_model.decoder.final_layernorm.weight": "language",
    "language_model.mtp.layers.0.eh_proj.weight": "language",
    "language_model.mtp.layers.0.mtp_model_layer.mlp.router.weight": "router",
}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_part(tied: bool) -> None:
    head = {"language_model.output_layer.weight": "embedding" if tied else "language"}
    assert {name: part_of(name, tied=tied) for name in NAMES | head} == NAMES | head
    assert set(NAMES.values()) == set(PARTS)


def test_only_a_model_with_experts_has_a_router() -> None:
    assert parts_of(EXPERTS) == PARTS
    assert parts_of(DENSE) == ("vision", "merger", "language", "embedding")


def parsed(words: str) -> argparse.Namespace:
    return PARSER.parse_args(words.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--freeze vision merger embedding",
        "--freeze vision --merger-lr-mult 0.1 --language-lr-mult 2",
        "--freeze-all-layers --skip-train",
        "--decoupled-lr 1 --vision-lr-mult 0.1 --merger-lr-mult 0.1",
        "--lr-warmup-init 0.1",
        "--decoupled-lr 1",
    ],
)
def test_arguments_that_pass(words: str) -> None:
    check_part_arguments(parsed(words), DENSE)


@pytest.mark.parametrize(
    ("words", "stated"),
    [
        ("--freeze router", "Qwen3VLForConditionalGeneration has no part router, expected some of vision, merger"),
        ("--router-lr-mult 2", "has no part router"),
        ("--freeze embedding merger language vision", "--freeze embedding merger language vision leaves no parameter"),
        ("--freeze-all-layers", "--freeze-all-layers leaves no parameter to train"),
        ("--vision-lr-mult 0", "multiplier of vision is 0.0, expected a positive number"),
        ("--vision-lr-mult -1", "expected a positive number"),
        ("--vision-lr-mult nan", "expected a positive number"),
        ("--vision-lr-mult inf", "expected a positive number"),
        ("--freeze vision --vision-lr-mult 0.1", "--vision-lr-mult 0.1: --freeze vision"),
        ("--merger-lr-mult 2 --lr-warmup-init 0.1", "--lr-warmup-init 0.1 with --merger-lr-mult"),
        ("--language-lr-mult 2 --decoupled-lr 0.1", "--decoupled-lr with --language-lr-mult"),
        ("--embedding-lr-mult 2 --decoupled-lr 0.1", "--decoupled-lr with --embedding-lr-mult"),
    ],
)
def test_arguments_that_are_rejected(words: str, stated: str) -> None:
    with pytest.raises(VLBridgeError) as rejection:
        check_part_arguments(parsed(words), DENSE)
    assert stated in str(rejection.value)


def test_with_experts_the_router_is_the_last_part_to_train() -> None:
    check_part_arguments(parsed("--freeze vision merger language embedding"), EXPERTS)
    with pytest.raises(VLBridgeError):
        check_part_arguments(parsed("--freeze vision merger language embedding router"), EXPERTS)


def test_a_misspelt_part_is_rejected() -> None:
    with pytest.raises(VLBridgeError, match="invalid choice: 'visual'"):
        parsed("--freeze visual")


def test_multipliers_of_the_arguments() -> None:
    words = "--vision-lr-mult 0.1 --merger-lr-mult 1 --router-lr-mult 2 --language-lr-mult 3 --embedding-lr-mult 4"
    expected = {"vision": 0.1, "merger": 1.0, "language": 3.0, "router": 2.0, "embedding": 4.0}
    assert lr_multipliers(parsed(words)) == expected
    assert lr_multipliers(parsed("")) == {}


def test_a_checkpoint_of_before_these_arguments_continues_without_them() -> None:
    """One that has no arguments at all tells nothing."""
    for saved in (argparse.Namespace(lr=1.0), None):
        check_resumed_parts(parsed(""), saved, "folder")
    check_resumed_parts(parsed("--freeze vision"), None, "folder")
    with pytest.raises(VLBridgeError, match="saved with nothing frozen, and this run is with --freeze vision"):
        check_resumed_parts(parsed("--freeze vision"), argparse.Namespace(lr=1.0), "folder")
    with pytest.raises(VLBridgeError, match=r"multipliers none, and this run has \{'merger': 2.0\}"):
        check_resumed_parts(parsed("--merger-lr-mult 2"), argparse.Namespace(lr=1.0), "folder")
    check_resumed_parts(parsed("--merger-lr-mult 2"), parsed("--merger-lr-mult 2"), "folder")
