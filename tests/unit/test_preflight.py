"""Sizes that cannot run are refused before Megatron makes anything, with the argument, its value and what would go."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.parser import make_parser, parse_words
from megatron_vlbridge.training.launch.preflight import check_arguments

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# 28 layers, 16 heads, 8 key-value heads, MLP of 6144; vision: 16 heads, MLP of 4096.
DENSE = read_config(CONFIGS / "Qwen3-VL-2B-Instruct.json")
# 48 layers, 32 heads, 4 key-value heads, 128 experts of 768.
EXPERTS = read_config(CONFIGS / "Qwen3-VL-30B-A3B-Instruct.json")
# 24 heads, 4 key-value heads, 16 key heads of linear attention.
LINEAR = read_config(CONFIGS / "Qwen3.5-27B.json")
PREDICTING = replace(DENSE, text=replace(DENSE.text, num_mtp_layers=1))
WIDTHS = replace(DENSE, vision=replace(DENSE.vision, intermediate_size=4100))
TEXT_WIDTH = replace(DENSE, text=replace(DENSE.text, intermediate_size=6148))
PARSER = make_parser(add_arguments)
COMPLETE = "--hf-folder hf --seq-length 2048 --lr 1e-3 --train-iters 10 --global-batch-size 16"

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
EP, ETP, LAYOUT = "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--pipeline-model-parallel-layout"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
CHUNKS, CHUNK_LAYERS = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
ZERO = (TP, PP, CP, EP, ETP, CHUNKS, CHUNK_LAYERS, "--seq-length", "--train-iters", "--global-batch-size")


def parsed(words: str, world: int = 1) -> argparse.Namespace:
    args = PARSER.parse_args(words.split())
    args.world_size = world
    return args


def refusal(words: str, world: int = 1, config: Config = DENSE, complete: str = COMPLETE) -> str:
    with pytest.raises(VLBridgeError) as error:
        check_arguments(parsed(f"{complete} {words}", world), config)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "world", "config", "stated"),
    [
        (f"{TP} 3", 3, DENSE, [f"{TP} 3", "16 attention heads", "8 key-value heads", "takes 1, 2, 4, 8 or 16"]),
        (f"{TP} 32", 32, EXPERTS, [f"{TP} 32", "16 heads of the vision tower", "takes 1, 2, 4, 8 or 16"]),
        (f"{TP} 8 {CP} 4", 32, LINEAR, ["8 x context-parallel size 4 = 32", "16 key heads", "one of 1, 2, 4, 8, 16"]),
        (f"{TP} 8", 8, WIDTHS, ["the 4100 columns of the vision tower's MLP", "takes 1, 2 or 4"]),
        (f"{TP} 8", 8, TEXT_WIDTH, ["the 6148 columns of the MLP", "takes 1, 2 or 4"]),
        (f"{PP} 8", 8, DENSE, [f"{PP} 8", "28 layers", "1, 2, 4, 7, 14 or 28"]),
        (f"{PP} 56", 56, DENSE, [f"{PP} 56", "28 layers"]),
        (f"{PP} 4 {FIRST} 5", 4, DENSE, [f"{FIRST} 5", "leaves 23 of 28 layers for 3 stages"]),
        (f"{PP} 2 {FIRST} 30", 2, DENSE, [f"{FIRST} 30", "leaves -2 of 28 layers"]),
        (f"{PP} 1 {FIRST} 10 {LAST} 17", 1, DENSE, ["leaves 1 of 28 layers for -1 stages"]),
        (f"{PP} 2 {FIRST} 10 {LAST} 10", 2, DENSE, [f"{FIRST} 10, {LAST} 10", "leaves 8 of 28 layers for 0 stages"]),
        (f"{PP} 2 {FIRST} 0", 2, DENSE, [f"{FIRST} is 0", "at least 1"]),
        (f"{PP} 2 {FIRST} 12 {LAYOUT} Et|L", 2, DENSE, [f"{FIRST} contradicts {LAYOUT}"]),
        (f"{PP} 2 {FIRST} 12 {CHUNK_LAYERS} 2", 2, DENSE, [f"{FIRST} contradicts {CHUNK_LAYERS}", CHUNKS]),
        (f"{PP} 2 {CHUNKS} 2 {CHUNK_LAYERS} 7", 2, DENSE, [CHUNK_LAYERS, CHUNKS, "use one of them"]),
        (f"{PP} 2 {LAYOUT} Etx|L", 2, DENSE, ["'Etx|L'", "E (embedding)"]),
        (f"{PP} 2 {LAYOUT} Et|t|L", 2, DENSE, ["3 stages", f"multiple of {PP} 2"]),
        (f"{PP} 2 {LAYOUT} Et*10|t*17L", 2, DENSE, ["27 decoder layers", "the model has 28"]),
        (f"{PP} 2 {LAYOUT} t*10E|t*18L", 2, DENSE, ["first layer must be embedding"]),
        (f"{PP} 2 {LAYOUT} Et*10|t*18", 2, DENSE, ["last layer must be loss"]),
        (f"{PP} 2 {LAYOUT} Et*10|t*18L", 2, PREDICTING, ["mtp layers", "then 1 m"]),
        (f"{PP} 2 {LAYOUT} Et*10|t*18mL", 2, DENSE, ["mtp layers", "then 0 m"]),
        (f"{LAYOUT} Et*10|t*18L", 1, DENSE, [f"need {PP} above 1"]),
        (f"{PP} 2 {CHUNKS} 4", 2, DENSE, [f"{CHUNKS} 4", "14 layers of a stage", "1, 2, 7 or 14"]),
        (f"{PP} 2 {CHUNK_LAYERS} 4", 2, DENSE, [f"{CHUNK_LAYERS} 4", "14 layers of a stage"]),
        (f"{PP} 4 {FIRST} 5 {LAST} 5 {CHUNKS} 5", 4, DENSE, [f"{CHUNKS} 5", "9 layers of a stage", "1, 3 or 9"]),
        (f"{PP} 4 {FIRST} 4 {LAST} 6 {CHUNKS} 3", 4, DENSE, [f"{CHUNKS} 3", f"the 4 layers of {FIRST}", "1, 2 or 4"]),
        (f"{PP} 2 {FIRST} 12 {LAST} 16 {CHUNKS} 2", 2, DENSE, ["needs a stage between", f"leave out {LAST}"]),
        (f"{CHUNKS} 2", 1, DENSE, [f"need {PP} above 1"]),
        (f"{PP} 2 {CHUNKS} 2 --no-overlap-p2p-communication", 2, DENSE, ["--no-overlap-p2p-communication"]),
        (f"{PP} 2 {CHUNKS} 2 --global-batch-size 7", 2, DENSE, ["7 micro-batches", "multiple of 2"]),
        (f"{PP} 2 {CHUNKS} 2 {GROUP} 4 --global-batch-size 3", 2, DENSE, ["3 micro-batches", "multiple of 4"]),
        (f"{PP} 2 {CHUNKS} 2 {GROUP} 1", 2, DENSE, [f"{GROUP} 1 is below {PP} 2"]),
        (f"{PP} 4 {CHUNKS} 7 --global-batch-size 4", 8, DENSE, ["2 micro-batches", "multiple of 8"]),
        (f"{CP} 2 --seq-length 2050", 2, DENSE, ["--seq-length 2050", "multiple of 4", "2048 or 2052"]),
        (f"{CP} 2 {TP} 8 --sequence-parallel --seq-length 2040", 16, DENSE, ["multiple of 16", "2032 or 2048"]),
        (f"{TP} 4 --sequence-parallel --seq-length 2", 4, DENSE, ["multiple of 4", "use 4"]),
        ("--seq-length 300000", 1, DENSE, ["--seq-length 300000", "262144 positions"]),
        (f"{CP} 2 --pack-multiple-of 6", 2, DENSE, ["--pack-multiple-of 6", "multiple of 4"]),
        (f"{EP} 2", 2, DENSE, [f"{EP} is 2", "no experts"]),
        (
            f"{EP} 256 --global-batch-size 256",
            256,
            EXPERTS,
            [f"{EP} 256", "128 experts", "1, 2, 4, 8, 16, 32, 64 or 128"],
        ),
        (f"{EP} 3 --global-batch-size 15", 3, EXPERTS, [f"{EP} 3", "128 experts"]),
        (f"{ETP} 5 --global-batch-size 15", 5, EXPERTS, [f"{ETP} 5", "768 columns of an expert", "24, 32, ..."]),
        (f"{TP} 2 {PP} 2 {CP} 2", 4, DENSE, ["4 processes", "= 8"]),
        (f"{TP} 2 {EP} 4 {ETP} 2", 4, EXPERTS, ["4 processes", f"{ETP} 2 x {EP} 4", "= 8"]),
        ("--num-distributed-optimizer-instances 3", 4, DENSE, ["instances 3", "the 4 data-"]),
        ("--global-batch-size 6", 4, DENSE, ["--global-batch-size 6", "4 data-parallel ranks", "4 or 8"]),
        ("--global-batch-size 2", 4, DENSE, ["--global-batch-size 2", "use 4"]),
        ("--eval-global-batch-size 6", 4, DENSE, ["--eval-global-batch-size 6", "4 or 8"]),
        ("--micro-batch-size 2", 1, DENSE, ["--micro-batch-size is 2", "a micro-batch is one pack"]),
        ("--eval-micro-batch-size 2", 1, DENSE, ["--eval-micro-batch-size is 2", "a micro-batch is one pack"]),
        ("--min-lr 0.1", 1, DENSE, ["--min-lr is 0.1", "--lr 0.001"]),
        ("--lr-warmup-iters 10", 1, DENSE, ["--lr-warmup-iters 10", "fewer than the 10"]),
        ("--lr-warmup-iters 7 --lr-decay-iters 5", 1, DENSE, ["--lr-warmup-iters 7", "fewer than the 5"]),
        ("--train-samples 10", 1, DENSE, ["--train-iters 10 and --train-samples 10"]),
        ("--conversations nowhere.jsonl", 1, DENSE, ["--conversations nowhere.jsonl", "no such file"]),
        ("--valid-conversations /", 1, DENSE, ["--valid-conversations /", "a folder"]),
        *(
            (f"{flag} 0", 1, DENSE, [f"{flag} is 0", "at least 1"])
            for flag in (TP, PP, CP, EP, ETP, CHUNKS, CHUNK_LAYERS)
        ),
        *(
            (f"{flag} 0", 1, DENSE, [f"{flag} is 0"])
            for flag in ("--seq-length", "--train-iters", "--global-batch-size")
        ),
    ],
)
def test_sizes_that_cannot_run_are_refused_with_the_numbers(words, world, config, stated):
    text = refusal(words, world, config)
    for part in stated:
        assert part in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("missing", ["--seq-length 2048", "--lr 1e-3", "--train-iters 10"])
def test_what_every_run_needs_is_named(missing):
    assert f"{missing.split()[0]} is missing" in refusal("", complete=COMPLETE.replace(missing, ""))


def test_virtual_stages_want_more_than_megatrons_default_of_one_micro_batch():
    complete = COMPLETE.replace("--global-batch-size 16", "")
    text = refusal(f"{PP} 2 {CHUNKS} 2", 4, complete=complete)
    assert "--global-batch-size 2 gives 1 micro-batches" in text
    assert text.endswith("a multiple of 4")


def test_all_faults_are_named_at_once():
    text = refusal(f"{TP} 3 {PP} 8 --min-lr 1", 24)
    assert [line.split()[0] for line in text.splitlines()] == [TP, PP, "--min-lr"]


@pytest.mark.parametrize(
    ("words", "world", "config"),
    [
        ("", 1, DENSE),
        (f"{TP} 16", 16, DENSE),  # more ranks than key-value heads
        (f"{TP} 4 --sequence-parallel {PP} 2 {CP} 2", 32, DENSE),
        (f"{PP} 3 {FIRST} 8", 3, DENSE),
        (f"{PP} 2 {FIRST} 8 {LAST} 20", 2, DENSE),
        (f"{PP} 4 {CHUNKS} 7", 4, DENSE),
        (f"{PP} 4 {CHUNK_LAYERS} 1", 4, DENSE),
        (f"{PP} 4 {LAYOUT} E|t*14|t*14|L", 4, DENSE),
        (f"{PP} 2 {LAYOUT} E(t|t|)*13t|tL --global-batch-size 2", 2, DENSE),
        (f"{PP} 3 {LAYOUT} Et*14|t*14m|L", 3, PREDICTING),
        (f"{TP} 2 --sequence-parallel {EP} 4 {ETP} 1 {PP} 2", 16, EXPERTS),
        ("--train-samples 100 --min-lr 1e-4", 1, DENSE),
        ("--global-batch-size 6 --decrease-batch-size-if-needed", 4, DENSE),
    ],
)
def test_what_can_run_passes(words, world, config):
    complete = COMPLETE.replace("--train-iters 10", "") if "--train-samples" in words else COMPLETE
    check_arguments(parsed(f"{complete} {words}", world), config)


@pytest.mark.parametrize(
    ("words", "stated"),
    [
        (["--tensor-model-paralel-size", "2"], "did you mean --tensor-model-parallel-size?"),
        (["--tensor-model-paralel-size=2"], "--tensor-model-paralel-size: no such argument; did you mean"),
        (["--hf-foldr", "x"], "did you mean --hf-folder?"),
        (["--conversation", "x"], "did you mean --conversations?"),
        (["--xyzzy"], "--xyzzy: no such argument; --help lists"),
        (["--bf16", "true"], "'true' after --bf16: a value that no argument takes"),
        (["train.jsonl"], "'train.jsonl': a value that no argument takes"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--optimizer", "adamw"], "--optimizer: invalid choice: 'adamw'"),
        (["--seq-length"], "--seq-length: expected one argument"),
    ],
)
def test_a_word_that_is_not_understood_is_refused_in_one_line(words, stated):
    with pytest.raises(VLBridgeError) as error:
        parse_words(PARSER, words)
    assert stated in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_every_help_text_of_megatron_can_be_shown():
    """Megatron-Core 0.19 has a percent sign in one that argparse takes for a format."""
    text = " ".join(PARSER.format_help().split())
    assert "headroom (e.g. 1.10 = 10%)" in text
    assert text.index("--hf-folder HF_FOLDER") < text.index("--tensor-model-parallel-size TENSOR")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("10%)", "10%)"), ("10%% of", "10% of"), ("50% of %(dest)s, 5%", "50% of x, 5%"), ("%%%(dest)s%", "%x%")],
)
def test_percent_signs_of_help_texts(text, shown):
    parser = make_parser(lambda parser: parser.add_argument("--x", help=text))
    assert f"--x X {shown} " in " ".join(parser.format_help().split()) + " "
