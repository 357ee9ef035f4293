"""Token ids and labels of a batch."""

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

IGNORED = -100


def filler_token(config: Config) -> int:
    """A token id for padding that is no placeholder."""
    return next(i for i in range(3) if i not in (config.image_token_id, config.video_token_id))


def placeholders(tokens: torch.Tensor, config: Config) -> torch.Tensor:
    """Which of the tokens `[T]` are image placeholders, and which are those of videos: bool `[2, T]`."""
    return torch.stack([tokens == i for i in (config.image_token_id, config.video_token_id)])


def check_vocabulary(what: str, ids: torch.Tensor, used: torch.Tensor, config: Config) -> None:
    """Reject `used` ids `[T]` outside the vocabulary: tensor-parallel embeddings and losses take them for zeros."""
    bad = (used & ((ids < 0) | (ids >= config.text.vocab_size))).nonzero().flatten()
    if len(bad):
        raise VLBridgeError(
            f"{what}: {len(bad)} ids lie outside the vocabulary of {config.text.vocab_size}, "
            f"the first is {int(ids[bad[0]])} at token {int(bad[0])} of the pack"
        )


def check_labels(labels: torch.Tensor, padding: torch.Tensor, where: str, config: Config) -> None:
    """Reject labels `[T]` outside the vocabulary, and labels of `padding` tokens (bool `[T]`)."""
    labelled = labels != IGNORED
    check_vocabulary("labels", labels, labelled, config)
    bad = (padding & labelled).nonzero().flatten()
    if len(bad):
        raise VLBridgeError(
            f"labels: {len(bad)} tokens of the padding have a label, the first is {int(labels[bad[0]])} at token "
            f"{int(bad[0])} of {where}; expected {IGNORED}"
        )
