"""A map-style dataset of packed conversations."""

import logging
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.conversations import FileConversation, read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import DEFAULTS, Conversation
from megatron_vlbridge.data.packing import best_fit, build_pack
from megatron_vlbridge.errors import VLBridgeError

__all__ = ["PackedConversations", "check_processor", "read_conversations"]

logger = logging.getLogger(__name__)


class PackedConversations(Dataset[dict[str, Tensor]]):
    """A map-style dataset of `num_samples` packs; item i is a pure function of the conversations, the seed and i.

    Each epoch shuffles the conversations and packs them again (`packing.best_fit`), so every conversation occurs once
    per epoch, together with different ones. Item i has the same tensors (see `packing.build_pack`) in every process,
    worker and resumed run.

    Each conversation is encoded once when the dataset is created, to determine its length; only the lengths are kept.
    `__getitem__` encodes it again, and raises an error if its length has changed. Assistant turns excluded from the
    loss (see `chat.encode_conversation`) are counted in `num_assistant_turns` and `num_excluded_turns`, and
    `excluded_turns_report` describes them; rank 0 logs it as a warning.

    The conversations have the format of `chat.encode_conversation`; `processor` and `config` are those of one
    checkpoint. A pack has `seq_length` tokens. The length of a conversation in it is rounded up to a multiple of
    `multiple_of`, for context-parallel padding: 2 * the context-parallel size if that is above 1. The space is
    reserved; the tensors are unpadded. `media` says how images and frames are read.

    Raises VLBridgeError: the processor does not match the config; a conversation cannot be encoded or is longer than
    `seq_length` (the error names its file and line, or its index); there are no conversations.

    Example: `PackedConversations(read_conversations("train.jsonl"), processor, config, seq_length=4096,
    num_samples=1000)[0]["tokens"]` has the shape `[4096]`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: ProcessorMixin,
        config: Config,
        *,
        seq_length: int,
        num_samples: int,
        seed: int = 0,
        multiple_of: int = 1,
        media: MediaOptions = DEFAULTS,
    ) -> None:
        check_processor(processor, config)
        if not conversations:
            raise VLBridgeError("conversations: expected at least one, found none")
        self.conversations = conversations
        self.processor = processor
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed
        self.multiple_of = multiple_of
        self.media = media
        self.num_assistant_turns = self.num_excluded_turns = 0
        self._first_excluded_turn = ""
        self.lengths: list[int] = []
        for index in range(len(conversations)):
            self._measure(index)
        self._epoch_starts = [0]
        self._cached_epoch: tuple[int, list[list[int]]] = (-1, [])
        if self.num_excluded_turns and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            logger.warning(self.excluded_turns_report)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        samples = [self._encode_again(member) for member in self.members(index)]
        return build_pack(samples, self.seq_length, self.processor.tokenizer.pad_token_id)

    def members(self, index: int) -> list[int]:
        """The indices of the conversations in pack `index`, in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"pack {index} is out of range for a dataset of {self.num_samples} packs")
        while index >= self._epoch_starts[-1]:
            epoch = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + len(self.epoch_packs(epoch)))
        epoch = bisect_right(self._epoch_starts, index) - 1
        return self.epoch_packs(epoch)[index - self._epoch_starts[epoch]]

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, each as a list of conversation indices; the last requested epoch is cached."""
        cached_epoch, packs = self._cached_epoch
        if cached_epoch != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths)).tolist()
            shuffled = best_fit([self._padded_length(self.lengths[member]) for member in order], self.seq_length)
            packs = [[order[position] for position in positions] for positions in shuffled]
            self._cached_epoch = epoch, packs
        return packs

    @property
    def excluded_turns_report(self) -> str:
        """The number of assistant turns excluded from the loss, and the first of them; empty if there are none."""
        if not self.num_excluded_turns:
            return ""
        return (
            f"{self.num_excluded_turns} of {self.num_assistant_turns} assistant turns are excluded from the loss, as "
            f"their tokens differ from the message (first: {self._first_excluded_turn})"
        )

    def _padded_length(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of

    def _measure(self, index: int) -> None:
        """Encode a conversation and record its length and its excluded turns."""
        sample = self._encode(index)
        length = len(sample.input_ids)
        if self._padded_length(length) > self.seq_length:
            raise VLBridgeError(
                f"{self._location(index)}: {length} tokens do not fit into a pack of {self.seq_length}; increase the "
                "sequence length, shorten the conversation or scale its images down"
            )
        self.lengths.append(length)
        self.num_assistant_turns += sum(message["role"] == "assistant" for message in self.conversations[index])
        self.num_excluded_turns += len(sample.excluded_turns)
        if sample.excluded_turns and not self._first_excluded_turn:
            first = sample.excluded_turns[0]
            self._first_excluded_turn = f"{self._location(index)}, message {first.message}: {first.reason}"

    def _encode_again(self, index: int) -> Sample:
        sample = self._encode(index)
        if len(sample.input_ids) != self.lengths[index]:
            raise VLBridgeError(
                f"{self._location(index)}: {len(sample.input_ids)} tokens, but {self.lengths[index]} when the dataset "
                "was created; its images have changed since then"
            )
        return sample

    def _encode(self, index: int) -> Sample:
        try:
            return encode_conversation(self.conversations[index], self.processor, media=self.media)
        except VLBridgeError as error:
            raise VLBridgeError(f"{self._location(index)}: {error}") from error

    def _location(self, index: int) -> str:
        conversation = self.conversations[index]
        return conversation.location if isinstance(conversation, FileConversation) else f"conversation {index}"


def check_processor(processor: ProcessorMixin, config: Config) -> None:
    """Check that the tokens and patches of a processor match the checkpoint (VLBridgeError with both values)."""
    vision, tokenizer = config.vision, processor.tokenizer
    pairs = {
        "image token id": (processor.image_token_id, config.image_token_id),
        "video token id": (processor.video_token_id, config.video_token_id),
    }
    for name in ("image", "video"):
        part = getattr(processor, f"{name}_processor")
        pairs[f"{name} channels"] = len(part.image_mean), vision.in_channels
        pairs[f"{name} patch size"] = part.patch_size, vision.patch_size
        pairs[f"{name} temporal patch size"] = part.temporal_patch_size, vision.temporal_patch_size
        pairs[f"{name} merge size"] = part.merge_size, vision.spatial_merge_size
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise VLBridgeError(
                f"processor: {name} {found}, but the config has {expected}; use the processor of the checkpoint"
            )
    if len(tokenizer) > config.text.vocab_size:
        raise VLBridgeError(
            f"processor: {len(tokenizer)} tokens, but the config has a vocabulary of {config.text.vocab_size}; use the "
            "processor of the checkpoint"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (config.image_token_id, config.video_token_id):
        raise VLBridgeError(
            f"processor: expected a pad token that is not a placeholder, found id {tokenizer.pad_token_id}"
        )
