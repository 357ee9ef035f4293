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
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch.labels import label_options
from megatron_vlbridge.training.launch.media import media_options
from megatron_vlbridge.training.launch.packing import packing_options
from megatron_vlbridge.training.pretrain import parse_arguments, run


def main() -> None:
    """Parse the arguments and train."""
    args = parse_arguments()
    if args.conversations is None:
        raise VLBridgeError("--conversations is missing: a JSON Lines file of {'messages': [...]}")
    processor = AutoProcessor.from_pretrained(args.hf_folder)
    config = read_config(args.hf_folder)

    def packs(file: str | None, split: str, count: int, *, log: bool) -> PackedConversations | None:
        if not file or not count:
            return None
        dataset = PackedConversations(
            read_conversations(file, split=split, literal_tags=args.literal_tags),
            processor,
            config,
            seq_length=args.seq_length,
            num_samples=count,
            seed=args.seed,
            multiple_of=args.pack_multiple_of,
            media=media_options(args),
            labels=label_options(args),
            packing=packing_options(args),
        )
        if log:
            kept = len(dataset.lengths) - len(dataset.dropped)
            console.note(f"data     {kept:,} conversations, {len(dataset.epoch_packs(0)):,} packs: {file}")
        return dataset

    def datasets(num_samples: list[int], vp_stage: int | None = None) -> list[PackedConversations | None]:
        files = {"train": args.conversations, "validation": args.valid_conversations, "test": None}
        return [
            packs(file, split, count, log=not vp_stage)
            for (split, file), count in zip(files.items(), num_samples, strict=True)
        ]

    run(args, datasets)


if __name__ == "__main__":
    main()
