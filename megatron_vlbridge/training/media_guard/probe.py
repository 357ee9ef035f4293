"""What a first pipeline stage does with pixels, found by running it on a small pack, twice with different pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron.core.utils import unwrap_model

from megatron_vlbridge.config import Config
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.model.inputs import Media, PackedInputs
from megatron_vlbridge.model.inputs.tokens import IGNORED
from megatron_vlbridge.model.vlm import Qwen3VLModel

# Merged tokens on each side of an image or frame.
_SIDE = 2
# Tokens of a conversation before its first placeholder.
_LEAD = 3


@dataclass(frozen=True)
class ProbePack:
    """This rank's part of a pack of four conversations: with an image, an image, a video of two frames, a video.

    `other_patches` are those of the pack, but for the second image and the second video. Their placeholders are
    `changed`, by kind; `free` are the tokens that do not depend on them. Both bool `[T]`.
    """

    inputs: PackedInputs
    other_patches: torch.Tensor
    changed: dict[str, torch.Tensor]
    free: torch.Tensor

    @classmethod
    def of(cls, stage: Qwen3VLModel) -> "ProbePack":
        """The pack for a first stage, on its device."""
        config, groups = stage.hf_config, stage.pg_collection
        image, video = _conversation(config, config.image_token_id, 1), _conversation(config, config.video_token_id, 2)
        conversations = (image, image, video, video)
        lengths = [len(tokens) for tokens in conversations]
        cp, tp = groups.cp.size(), groups.tp.size()
        padded = sum(-(-length // (2 * cp)) * 2 * cp for length in lengths)
        total = -(-padded // (2 * cp * tp)) * 2 * cp * tp
        text = _text(config)
        tokens, labels = torch.full((1, total), text), torch.full((1, total), IGNORED)
        tokens[0, : sum(lengths)] = torch.cat(conversations)
        labels[0, : sum(lengths)] = text
        layout = BatchLayout.packed(lengths, total)
        inputs = PackedInputs.from_pack(layout, tokens, _media(config), config, labels if stage.post_process else None)
        inputs = inputs.context_parallel(cp, groups.cp.rank(), config)
        index = inputs.layout.gather_index
        ends = torch.tensor(lengths).cumsum(0)
        segment = torch.searchsorted(ends, index, right=True).masked_fill(index < 0, -1)
        lead = index - (ends - torch.tensor(lengths))[segment] < _LEAD
        if stage.config.sequence_parallel:
            inputs = inputs.with_sequence_shard(tp, groups.tp.rank())
        other = inputs.patches.clone()
        frame = len(other) // 6
        other[frame : 2 * frame] += 1
        other[4 * frame :] += 1
        device = next(stage.parameters()).device
        return cls(
            inputs.to(device),
            other.to(device),
            {
                "image": (segment == 1) & (inputs.tokens[0] == config.image_token_id),
                "video": (segment == 3) & (inputs.tokens[0] == config.video_token_id),
            },
            (segment == 0) | (segment == 2) | ((segment >= 0) & lead),
        )

    def rows(self, output: torch.Tensor, stage: Qwen3VLModel) -> torch.Tensor:
        """Of the output of a stage `[t, n]`: the loss of each token of this rank, or its hidden states."""
        if stage.post_process:
            return output.reshape(-1, 1)
        # Deepstack features follow the hidden states.
        return output[: self.inputs.tokens.shape[1] // self._shards(stage), 0]

    def part(self, tokens: torch.Tensor, stage: Qwen3VLModel) -> torch.Tensor:
        """Of `[T]` those tokens that are the rows of this rank's output."""
        shards = 1 if stage.post_process else self._shards(stage)
        return tokens.chunk(shards)[stage.pg_collection.tp.rank() if shards > 1 else 0]

    def _shards(self, stage: Qwen3VLModel) -> int:
        return 1 if self.inputs.shard is None else int(stage.pg_collection.tp.size())


def check_pixels(model: torch.nn.Module, stage: Qwen3VLModel) -> list[str]:
    """Other pixels must change the output of `model` at each of their tokens, and not before them or elsewhere.

    `model` is a first stage with all that wraps it. Collective over the ranks of the stage; the model's state, modes
    and random numbers stay as they were.
    """
    pack = ProbePack.of(stage)
    with _unchanged(model, stage, pack.inputs.layout.total), torch.no_grad():
        patches = (pack.inputs.patches, pack.other_patches)
        outputs = [model(inputs=replace(pack.inputs, patches=x)) for x in patches]
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        return [f"expected a tensor as the output of the forward, found {type(outputs[0]).__name__}"]
    before, after = (pack.rows(output, stage).double() for output in outputs)
    difference = (after - before).abs().amax(-1).cpu()
    # Experts with other tokens may round the same token differently.
    rounding = torch.finfo(stage.config.params_dtype).eps ** 0.5 * before.abs().amax(-1).cpu()
    findings = []
    for kind, changed in pack.changed.items():
        still, of = int((difference[pack.part(changed, stage)] == 0).sum()), int(pack.part(changed, stage).sum())
        if still:
            findings.append(
                f"expected other pixels of a {kind} to change the output at each of its tokens, found {still} of {of} "
                "that did not change. The forward of this stage must pass the patches and grids to the vision tower "
                "and put its features in place of the placeholders' embeddings"
            )
    if leaked := int((difference > rounding)[pack.part(pack.free, stage)].sum()):
        findings.append(
            "expected other pixels to change only their own tokens and later ones of the same conversation, found "
            f"{leaked} more that changed. They got the pixels of others, or attend to later tokens"
        )
    return findings


@contextmanager
def _unchanged(model: torch.nn.Module, stage: Qwen3VLModel, total: int) -> Iterator[None]:
    """Without dropout, packs having `total` tokens; everything is as before afterwards."""
    parts = list(model.modules())
    training = [part for part in parts if part.training]
    # Transformer Engine clears it in each forward.
    first = {part: part.is_first_microbatch for part in parts if hasattr(part, "is_first_microbatch")}
    buffers = {buffer: buffer.clone() for buffer in unwrap_model(model).buffers()}
    seq_length = stage.seq_length
    device = next(stage.parameters()).device
    try:
        for part in training:
            part.training = False
        stage.seq_length = total
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        stage.seq_length = seq_length
        for part in training:
            part.training = True
        for part, value in first.items():
            part.is_first_microbatch = value
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _conversation(config: Config, placeholder: int, frames: int) -> torch.Tensor:
    """Text, then each frame between its marks, then text."""
    text = _text(config)
    frame = [config.vision_start_token_id, *[placeholder] * _SIDE**2, config.vision_end_token_id]
    return torch.tensor([text, text, *frame * frames, text])


def _text(config: Config) -> int:
    """A token id of text."""
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    return next(i for i in range(len(special) + 2) if i not in special | {config.text.pad_token_id})


def _media(config: Config) -> Media:
    side = _SIDE * config.vision.spatial_merge_size
    generator = torch.Generator().manual_seed(0)
    images, videos = (torch.randn(n * side**2, config.vision.patch_dim, generator=generator) for n in (2, 4))
    return Media(images, torch.tensor([[1, side, side]] * 2), videos, torch.tensor([[2, side, side]] * 2))
