"""Train Qwen3-VL or Qwen3.5 with Megatron's `pretrain`, on GPUs or on CPU processes.

From a Hugging Face folder or Hub id:

    torchrun --nproc_per_node 8 examples/pretrain.py --hf-folder Qwen3-VL-8B-Instruct --hf-weights \
        --conversations train.jsonl --tensor-model-parallel-size 4 --sequence-parallel --seq-length 8192 \
        --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-5 --bf16 --save out

From an imported Megatron checkpoint: `--hf-folder DIR/hf --pretrained-checkpoint DIR` instead of the first two
arguments. On the CPU: add `--cpu`. Megatron's full log: `--verbose`. All other arguments are Megatron's; the
architecture is read from --hf-folder.
"""

import sys

from megatron_vlbridge.training import console

# First, since imports can also fail and warn.
console.start()

from megatron_vlbridge.backends import cpu_runtime

if "--cpu" in sys.argv:
    cpu_runtime.enable()

from transformers import AutoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch.data import (
    data_file,
    decodes_media,
    logs_data,
    open_conversations,
    open_lengths,
)
from megatron_vlbridge.training.launch.labels import label_options
from megatron_vlbridge.training.launch.media import media_options
from megatron_vlbridge.training.launch.packing import packing_options
from megatron_vlbridge.training.pretrain import parse_arguments, run


def main() -> None:
    """Parse the arguments and train."""
    args = parse_arguments()
    if args.data is None and args.conversations is None:
        raise VLBridgeError("--data is missing: a YAML file of sources, or a file of conversations")
    processor = AutoProcessor.from_pretrained(args.hf_folder)
    config = read_config(args.hf_folder)

    def packs(split: str, count: int, vp_stage: int | None) -> PackedConversations | None:
        conversations = open_conversations(args, split) if count else None
        if conversations is None:
            return None
        media, labels = media_options(args), label_options(args)
        measure = Measure(processor, config.vision.hidden_size, media, labels)
        dataset = PackedConversations(
            conversations,
            processor,
            config,
            seq_length=args.seq_length,
            num_samples=count,
            seed=args.seed,
            multiple_of=args.pack_multiple_of,
            media=media,
            labels=labels,
            packing=packing_options(args),
            lengths=open_lengths(args, split, conversations, measure),
            max_bad_samples=args.max_bad_samples,
            decode_media=decodes_media(args, vp_stage),
            log=logs_data(vp_stage),
        )
        if not vp_stage:
            kept = len(dataset.selection.kept)
            file = f"{data_file(args, split)}, {split}"
            console.note(f"data     {kept:,} conversations, {len(dataset.epoch_packs(0)):,} packs: {file}")
        return dataset

    def datasets(num_samples: list[int], vp_stage: int | None = None) -> list[PackedConversations | None]:
        train, valid, _ = num_samples
        return [packs("train", train, vp_stage), packs("valid", valid, vp_stage), None]

    run(args, datasets)


if __name__ == "__main__":
    main()
