"""The architecture that the command line describes is the checkpoint's, whatever the family."""

from pathlib import Path

import pytest
import torch
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_vlbridge import families, read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch import arguments
from megatron_vlbridge.training.launch.parser import make_parser

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FILES = [
    CONFIGS / f"{name}.json"
    for name in ("Qwen3-VL-2B-Instruct", "Qwen3-VL-30B-A3B-Instruct", "Qwen3.5-27B", "Qwen3.5-35B-A3B")
]
PARSER = make_parser(arguments.add_arguments)


def completed(file: Path, *words: str):
    args = PARSER.parse_args(["--hf-folder", str(file), *words])
    args.params_dtype = torch.float32
    arguments._set_architecture(args, read_config(file), PARSER)
    return args


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_megatrons_config_of_the_arguments_has_the_fields_of_the_family(file: Path) -> None:
    hf_config = read_config(file)
    config = core_transformer_config_from_args(completed(file))
    expected = families.find(hf_config).language_fields(hf_config)
    del expected["bias_activation_fusion"]  # a choice of kernels, which the model's config makes afterwards
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "words",
    [
        "--apply-layernorm-1p",
        "--add-qkv-bias",
        "--window-size 8,8",
        "--rotary-interleaved",
        "--init-method-std 0.5",
        "--moe-layer-freq 2",
        "--moe-router-pre-softmax",
        "--moe-router-score-function sigmoid",
        "--moe-router-dtype fp64",
        "--moe-ffn-hidden-size 5",
        "--moe-router-topk 3",
        "--norm-epsilon 0.5",
    ],
)
def test_an_argument_that_contradicts_the_checkpoint_is_rejected(words: str) -> None:
    """Also where the model's config would take the checkpoint's value whatever the argument says."""
    with pytest.raises(VLBridgeError) as error:
        completed(FILES[1], *words.split())
    assert f"{words.split()[0]} is " in str(error.value)


def test_an_argument_that_agrees_with_the_checkpoint_is_accepted() -> None:
    words = "--moe-router-topk 8 --moe-router-dtype fp32 --norm-epsilon 1e-6 --init-method-std 0.02 --num-layers 48"
    assert completed(FILES[1], *words.split()).num_experts == 128
