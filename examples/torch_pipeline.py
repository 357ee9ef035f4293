"""Train Qwen3-VL of transformers in a pipeline of `torch.distributed.pipelining`, on GPUs or on CPU processes.

    torchrun --nproc_per_node 2 examples/torch_pipeline.py HF_FOLDER CONVERSATIONS.jsonl OUT_FOLDER

OUT_FOLDER gets a Hugging Face checkpoint. Kept small: one pipeline, and every rank loads the whole model and keeps its
part. docs/torch-pipeline.md describes what your own loop needs.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.integrations import MediaStage, check_pipeline_media, media_kwargs

STEPS, SAMPLES, MICRO_BATCHES = 20, 8, 4


class Part(nn.Module):
    """The layers of one stage; the first also has the tower and the embedding, the last the norm and the head."""

    def __init__(self, model: Any, index: int, num_stages: int) -> None:
        super().__init__()
        text = model.model.language_model
        count, more = divmod(len(text.layers), num_stages)
        start = index * count + min(index, more)
        stop = start + count + (index < more)
        text.layers = text.layers[start:stop]
        text.config = copy.deepcopy(text.config)
        text.config.num_hidden_layers = stop - start
        if getattr(text.config, "layer_types", None):
            text.config.layer_types = text.config.layer_types[start:stop]
        self.first, self.last = index == 0, index == num_stages - 1
        if not self.first:
            text.embed_tokens = None
        if not self.last:
            text.norm = nn.Identity()
        self.model = model.model if self.first else text
        self.head = model.lm_head if self.last else None

    def forward(self, inputs: Tensor, **keywords: Any) -> Tensor:
        """Hidden states, or the logits of the last stage; `inputs` are tokens or hidden states."""
        keywords["input_ids" if self.first else "inputs_embeds"] = inputs
        hidden = self.model(**keywords, use_cache=False).last_hidden_state
        return self.head(hidden) if self.head else hidden


def collate(samples: Sequence[Sample], length: int, pad: int, model: Any) -> dict[str, Tensor]:
    """A padded batch `[B, length]`, with the number of images and videos of each sample."""
    tokens = [sample.input_ids for sample in samples]
    targets = [torch.where(sample.loss_mask, sample.input_ids, -100)[1:] for sample in samples]
    # One row more has the full length.
    full = torch.zeros(length, dtype=torch.int64)
    batch = {
        "input_ids": pad_sequence([*tokens, full], batch_first=True, padding_value=pad)[:-1],
        "labels": pad_sequence([*targets, full], batch_first=True, padding_value=-100)[:-1],
        "n_images_per_sample": torch.tensor([len(sample.image_grid_thw) for sample in samples]),
        "n_videos_per_sample": torch.tensor([len(sample.video_grid_thw) for sample in samples]),
    }
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        batch[key] = torch.cat([getattr(sample, key) for sample in samples])
    images, videos = (
        (batch["input_ids"] == model.config.image_token_id),
        (batch["input_ids"] == model.config.video_token_id),
    )
    batch["position_ids"], _ = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=images + 2 * videos,
        image_grid_thw=batch["image_grid_thw"],
        video_grid_thw=batch["video_grid_thw"],
    )
    return batch


def main(folder: str, conversations: str, out: str) -> None:
    """Train a few steps and save."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, stages = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    processor, config = AutoProcessor.from_pretrained(folder), read_config(folder)
    samples = [encode_conversation(messages, processor) for messages in read_conversations(conversations)]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    names = {parameter: name for name, parameter in model.named_parameters()}
    length = max(len(sample.input_ids) for sample in samples)
    # The same samples in the same order on every rank.
    batches = [
        collate([samples[(step * SAMPLES + i) % len(samples)] for i in range(SAMPLES)], length, 0, model)
        for step in range(STEPS)
    ]
    part = Part(model, rank, stages).to(device)
    stage = PipelineStage(MediaStage(part), rank, stages, device)
    supervised = 1

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / supervised

    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    check_pipeline_media(stage, batches[0], MICRO_BATCHES, config=config, **ids)
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_fn, scale_grads=False)
    ends = dist.new_group([0, stages - 1]) if config.tie_word_embeddings and stages > 1 else None
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3, weight_decay=0.0)
    for step, on_cpu in enumerate(batches):
        batch = {key: tensor.to(device) for key, tensor in on_cpu.items()}
        supervised = int((batch["labels"] != -100).sum())
        inputs, losses = [batch["input_ids"]] if part.first else [], []
        target = batch["labels"] if part.last else None
        schedule.step(*inputs, target=target, losses=losses, **media_kwargs(batch, config=config))
        if ends is not None and (part.first or part.last):
            # Embedding and head are one tensor, of which each end of the pipeline has a copy.
            tied = part.head if part.last else part.model.language_model.embed_tokens
            dist.all_reduce(tied.weight.grad, group=ends)
        optimizer.step()
        optimizer.zero_grad()
        if part.last:
            print(f"step {step:3}  loss {torch.stack(losses).sum():.4f}", flush=True)
    trained = [{} for _ in range(stages)]
    dist.all_gather_object(trained, {names[parameter]: parameter.data.cpu() for parameter in part.parameters()})
    if rank == 0:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict({name: x for of_rank in trained for name, x in of_rank.items()}, strict=False)
        model.save_pretrained(out)
        processor.save_pretrained(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
