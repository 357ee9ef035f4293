"""Conversations as an endless, resumable row of packs."""

import logging
from collections.abc import Sequence

import numpy as np
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.conversations import LocatedConversation, read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import DEFAULTS, Conversation
from megatron_vlbridge.data.packing import build_pack, pack
from megatron_vlbridge.errors import VLBridgeError

__all__ = ["PackedConversations", "check_processor", "read_conversations"]

logger = logging.getLogger(__name__)


class PackedConversations(Dataset[dict[str, Tensor]]):
    """A map-style dataset of `num_samples` packs; item i is a pure function of the conversations, the seed and i.

    Every epoch shuffles the conversations anew and packs them (`packing.pack`), so each is seen once an epoch, in
    changing company. Any process, worker or resumed run that asks for item i gets the same tensors (see
    `packing.build_pack` for them).

    Each conversation is encoded once when the dataset is made, to know its true length; only lengths are kept. An
    item is encoded again when it is asked for, and refused if its length has changed. Assistants' turns without loss
    (see `chat.encode_conversation`) are counted: `assistant_turns`, `unlearned_turns`, and in words `unlearned_report`,
    which rank 0 logs as a warning.

    Args:
        conversations: in the form that `chat.encode_conversation` takes.
        processor: the checkpoint's own.
        config: the checkpoint's own; tokens and patches of the processor must fit it.
        seq_length: tokens of a pack.
        num_samples: how many packs the dataset has; as many epochs are begun as that needs.
        seed: of the shuffling.
        multiple_of: what each conversation's length is padded to inside a pack; 2 * the context-parallel size, if
            that is not 1. Room is left for the padding; the tensors stay without it.
        media: how images and frames are read.

    Raises:
        VLBridgeError: processor and config do not fit each other; a conversation cannot be encoded or is longer than
            `seq_length` (it is named by file and line, or else by its index); there is no conversation.

    Example:
        >>> packs = PackedConversations(read_conversations("train.jsonl"), processor, config,
        ...                             seq_length=4096, num_samples=1000)  # doctest: +SKIP
        >>> packs[0]["tokens"].shape  # doctest: +SKIP
        torch.Size([4096])
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
        self.assistant_turns = self.unlearned_turns = 0
        self._first_unlearned = ""
        sizes = np.array([self._size(index) for index in range(len(conversations))])
        self.lengths: list[int] = sizes[:, 0].tolist()
        self._supervised: list[int] = sizes[:, 1].tolist()
        self._first_of_epoch = [0]
        self._packs_of_epoch: tuple[int, list[list[int]]] = (-1, [])
        if self.unlearned_turns and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            logger.warning(self.unlearned_report)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        samples = [self._encode(member) for member in self.members(index)]
        return build_pack(samples, self.seq_length, self.processor.tokenizer.pad_token_id)

    def members(self, index: int) -> list[int]:
        """The indices of the conversations in pack `index`, in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"pack {index} of a dataset of {self.num_samples}")
        while index >= self._first_of_epoch[-1]:
            epoch = len(self._first_of_epoch) - 1
            self._first_of_epoch.append(self._first_of_epoch[-1] + len(self.epoch_packs(epoch)))
        epoch = int(np.searchsorted(self._first_of_epoch, index, side="right")) - 1
        return self.epoch_packs(epoch)[index - self._first_of_epoch[epoch]]

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """All packs of an epoch, as indices of conversations."""
        if self._packs_of_epoch[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths)).tolist()
            packs = pack([self._room(self.lengths[member]) for member in order], self.seq_length)
            self._packs_of_epoch = epoch, [[order[place] for place in places] for places in packs]
        return self._packs_of_epoch[1]

    def supervised_tokens(self, index: int) -> int:
        """How many labels pack `index` has, without encoding it."""
        return sum(self._supervised[member] for member in self.members(index))

    @property
    def unlearned_report(self) -> str:
        """How many assistants' turns have no loss, and the first of them; empty where all have."""
        if not self.unlearned_turns:
            return ""
        return (
            f"{self.unlearned_turns} of {self.assistant_turns} assistant turns are not learned: the chat template "
            f"changes their text (first: {self._first_unlearned})"
        )

    def _room(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of

    def _size(self, index: int) -> tuple[int, int]:
        sample = self._encoded(index)
        length = len(sample.input_ids)
        if self._room(length) > self.seq_length:
            raise VLBridgeError(
                f"{self._place(index)}: {length} tokens do not fit into a pack of {self.seq_length}; raise the "
                "sequence length, shorten the conversation or make its images smaller"
            )
        self._count_turns(index, sample)
        return length, int(sample.loss_mask.sum())

    def _count_turns(self, index: int, sample: Sample) -> None:
        self.assistant_turns += sum(message["role"] == "assistant" for message in self.conversations[index])
        self.unlearned_turns += len(sample.unlearned)
        if sample.unlearned and not self._first_unlearned:
            first = sample.unlearned[0]
            self._first_unlearned = f"{self._place(index)}, message {first.message}: {first.reason}"

    def _encode(self, index: int) -> Sample:
        sample = self._encoded(index)
        if len(sample.input_ids) != self.lengths[index]:
            raise VLBridgeError(
                f"{self._place(index)}: {len(sample.input_ids)} tokens, but {self.lengths[index]} when the dataset "
                "was made; its images have changed meanwhile"
            )
        return sample

    def _encoded(self, index: int) -> Sample:
        try:
            return encode_conversation(self.conversations[index], self.processor, media=self.media)
        except VLBridgeError as error:
            raise VLBridgeError(f"{self._place(index)}: {error}") from error

    def _place(self, index: int) -> str:
        conversation = self.conversations[index]
        return conversation.place if isinstance(conversation, LocatedConversation) else f"conversation {index}"


def check_processor(processor: ProcessorMixin, config: Config) -> None:
    """Refuse a processor whose tokens or patches are not those of the checkpoint (VLBridgeError with both values)."""
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
                f"processor: {name} {found}, but the config says {expected}; use the checkpoint's own processor"
            )
    if len(tokenizer) > config.text.vocab_size:
        raise VLBridgeError(
            f"processor: {len(tokenizer)} tokens, but the config's vocabulary has {config.text.vocab_size}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (config.image_token_id, config.video_token_id):
        raise VLBridgeError(
            f"processor: expected a pad token that is no placeholder, found id {tokenizer.pad_token_id}"
        )
