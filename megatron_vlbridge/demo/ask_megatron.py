"""Ask Megatron the held-out questions, in a process of its own.

`python -m megatron_vlbridge.demo.ask_megatron HF_FOLDER CONVERSATIONS RESULT CHECKPOINT [ADAPTERS]` loads a
`torch_dist` checkpoint of any layout, and one of adapters, with Megatron-Core's own loader into one CPU process, and
writes an `Answers` file.
"""

import os
import sys
import tempfile
from pathlib import Path

from megatron_vlbridge.backends import cpu_runtime
from megatron_vlbridge.training.failure import report_failures

if __name__ == "__main__":
    report_failures()
    # Before Megatron is imported.
    cpu_runtime.enable()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from transformers import AutoProcessor, BatchFeature

from megatron_vlbridge.checkpoint.formats import locate
from megatron_vlbridge.checkpoint.peft.manifest import read_adapter_manifest
from megatron_vlbridge.demo.answers import MAX_NEW_TOKENS, ask
from megatron_vlbridge.demo.digits import load_conversations
from megatron_vlbridge.families import read_config
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.model.lora.targets import module_of
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel

MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def main() -> None:
    """Load, ask, write."""
    hf_folder, conversations, result, checkpoint, *adapters = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            model = _build(hf_folder)
            _load(model, locate(checkpoint))
            for run in adapters:
                _load_adapters(model, locate(run))
            _ask(model.eval(), hf_folder, conversations, result)
        finally:
            dist.destroy_process_group()


def _build(hf_folder: Path) -> Qwen3VLModel:
    config = read_config(hf_folder)
    return Qwen3VLModel(
        language_config(
            config, use_cpu_initialization=True, params_dtype=torch.float32, gradient_accumulation_fusion=False
        ),
        config,
    )


def _load_adapters(model: Qwen3VLModel, folder: Path) -> None:
    saved = read_adapter_manifest(folder)
    assert saved is not None
    add_lora(model, rank=saved.rank, alpha=saved.alpha, targets=[module_of(weight) for weight in saved.weights])
    _load(model, folder)


def _load(model: Qwen3VLModel, folder: Path) -> None:
    state_dict = model.sharded_state_dict()
    names = list(state_dict)
    # The loader also gives what the training keeps next to the weights.
    state = dist_checkpointing.load(state_dict, os.fspath(folder))
    model.load_state_dict({name: state[name] for name in names})


@torch.inference_mode()
def _ask(model: Qwen3VLModel, hf_folder: Path, conversations: Path, result: Path) -> None:
    def forward(batch: BatchFeature) -> torch.Tensor:
        return model(**batch)

    def generate(batch: BatchFeature) -> torch.Tensor:
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        start = tokens.shape[1]
        images = {name: batch[name] for name in MEDIA_KEYS if name in batch}
        for _ in range(MAX_NEW_TOKENS):
            logits = model(tokens, attention_mask=mask, **images)
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        return tokens[:, start:]

    ask(load_conversations(conversations), AutoProcessor.from_pretrained(hf_folder), forward, generate).save(result)


if __name__ == "__main__":
    main()
