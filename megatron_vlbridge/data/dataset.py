"""A map-style dataset of packed conversations."""

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import DEFAULT_LABELS, Sample, encode_conversation
from megatron_vlbridge.data.conversations import FileConversation, read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.media import DEFAULTS, Conversation
from megatron_vlbridge.data.packing.offline import PackingOptions, order_packs, pack_lengths
from megatron_vlbridge.data.packing.packs import best_fit, build_pack
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.balance import frame_work

DEFAULT_PACKING = PackingOptions()

__all__ = ["PackedConversations", "check_processor", "read_conversations"]

logger = logging.getLogger(__name__)


class PackedConversations(Dataset[dict[str, Tensor]]):
    """A map-style dataset of `num_samples` packs; item i is a pure function of the conversations, the seed and i.

    Each epoch shuffles the conversations and packs them again (see `packing.offline.PackingOptions`), so every
    conversation occurs once per epoch, together with different ones. Item i has the same tensors (see
    `packing.packs.build_pack`) in every process, worker and resumed run.

    Each conversation is encoded once when the dataset is created, to determine its length; only the lengths are kept.
    `__getitem__` encodes it again, and raises an error if its length has changed. Assistant turns excluded from the
    loss (see `chat.encode_conversation`) are counted in `num_assistant_turns` and `num_excluded_turns`, and
    `excluded_turns_report` describes them; rank 0 logs it as a warning.

    The conversations have the format of `chat.encode_conversation`; `processor` and `config` are those of one
    checkpoint. A pack has `seq_length` tokens. The length of a conversation in it is rounded up to a multiple of
    `multiple_of`, for context-parallel padding: 2 * the context-parallel size if that is above 1. The space is
    reserved; the tensors are unpadded. `media` says how images and frames are read, `labels` what is learned
    (`num_skipped_turns` assistant turns are not), `packing` how packs are formed.
    With `too_long="drop"` conversations that fit into no pack are left out: `dropped` has their indices,
    `dropped_report` describes them; rank 0 logs it.

    Raises VLBridgeError: the processor does not match the config; a conversation cannot be encoded or exceeds a limit
    of a pack (the error names its file and line, or its index); there are no conversations, or all were dropped.

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
        labels: LabelOptions = DEFAULT_LABELS,
        packing: PackingOptions = DEFAULT_PACKING,
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
        self.labels = labels
        self.packing = packing
        self.hidden_size = config.vision.hidden_size
        self.num_assistant_turns = self.num_excluded_turns = self.num_skipped_turns = 0
        self._first_excluded_turn = ""
        self.lengths: list[int] = []
        self.dropped: list[int] = []
        self._first_dropped = ""
        # Of each conversation: its patches, and its work in the vision tower.
        self._patches: list[int] = []
        self._work: list[int] = []
        for index in range(len(conversations)):
            self._measure(index)
        if len(self.dropped) == len(conversations):
            raise VLBridgeError(f"conversations: expected at least one that fits into a pack; {self.dropped_report}")
        self._kept = np.setdiff1d(np.arange(len(conversations)), self.dropped)
        self._epoch_starts = [0]
        self._cached_epoch: tuple[int, list[list[int]]] = (-1, [])
        for report in filter(None, (self.excluded_turns_report, self.skipped_turns_report, self.dropped_report)):
            if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
                logger.warning(report)

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
            self._epoch_start(len(self._epoch_starts))
        epoch = bisect_right(self._epoch_starts, index) - 1
        return self.epoch_packs(epoch)[index - self._epoch_starts[epoch]]

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, each as a list of conversation indices; the last requested epoch is cached."""
        if self._cached_epoch[0] != epoch:
            pack = self._best_fit if self.packing.method == "best-fit" else self._first_fit_decreasing
            self._cached_epoch = epoch, pack(epoch)
        return self._cached_epoch[1]

    def _epoch_start(self, epoch: int) -> int:
        """The number of packs in the epochs before this one."""
        while len(self._epoch_starts) <= epoch:
            last = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[last] + len(self.epoch_packs(last)))
        return self._epoch_starts[epoch]

    def _best_fit(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self._kept).tolist()
        packs = best_fit([self._padded_length(self.lengths[member]) for member in order], self.seq_length)
        return [[order[position] for position in positions] for positions in packs]

    def _first_fit_decreasing(self, epoch: int) -> list[list[int]]:
        options, seed = self.packing, (self.seed, epoch)
        packs = pack_lengths(
            self.lengths,
            self.seq_length,
            multiple_of=self.multiple_of,
            patches=self._patches,
            max_patches=options.max_patches,
            window=options.window,
            too_long="drop",
            seed=seed,
        ).packs
        start = self._epoch_start(epoch)
        ordered = order_packs(packs, self._work, neighbors=options.neighbors, start=start, seed=seed)
        return [members.tolist() for members in ordered]

    @property
    def excluded_turns_report(self) -> str:
        """The number of assistant turns excluded from the loss, and the first of them; empty if there are none."""
        if not self.num_excluded_turns:
            return ""
        return (
            f"{self.num_excluded_turns} of {self.num_assistant_turns} assistant turns are excluded from the loss, as "
            f"their tokens differ from the message (first: {self._first_excluded_turn})"
        )

    @property
    def skipped_turns_report(self) -> str:
        """The number of assistant turns that were not to be learned; empty if there are none."""
        if not self.num_skipped_turns:
            return ""
        return (
            f"{self.num_skipped_turns} of {self.num_assistant_turns} assistant turns are not learned, as they have "
            '"train": false or --label-turns is last'
        )

    @property
    def dropped_report(self) -> str:
        """The number of conversations that were dropped, and the first of them; empty if there are none."""
        if not self.dropped:
            return ""
        return f"{len(self.dropped)} of {len(self.lengths)} conversations are dropped (first: {self._first_dropped})"

    def _padded_length(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of

    def _measure(self, index: int) -> None:
        """Encode a conversation and record its sizes and its excluded turns."""
        sample = self._encode(index)
        grids = [*sample.image_grid_thw.tolist(), *sample.video_grid_thw.tolist()]
        self.lengths.append(len(sample.input_ids))
        self._patches.append(sum(math.prod(grid) for grid in grids))
        self._work.append(sum(frames * frame_work(rows * columns, self.hidden_size) for frames, rows, columns in grids))
        if excess := self._excess(index):
            if self.packing.too_long == "error":
                raise VLBridgeError(
                    f"{self._location(index)}: {excess}; increase the limit, shorten the conversation, scale its "
                    "images down, or drop it (--long-conversations drop)"
                )
            self.dropped.append(index)
            self._first_dropped = self._first_dropped or f"{self._location(index)}: {excess}"
            return
        self.num_assistant_turns += sum(message["role"] == "assistant" for message in self.conversations[index])
        self.num_excluded_turns += len(sample.excluded_turns)
        self.num_skipped_turns += len(sample.skipped_turns)
        if sample.excluded_turns and not self._first_excluded_turn:
            first = sample.excluded_turns[0]
            self._first_excluded_turn = f"{self._location(index)}, message {first.message}: {first.reason}"

    def _excess(self, index: int) -> str:
        """The limit that a conversation alone exceeds; empty if it fits into a pack."""
        if self._padded_length(self.lengths[index]) > self.seq_length:
            return f"{self.lengths[index]} tokens do not fit into a pack of {self.seq_length}"
        if self.packing.max_patches is not None and self._patches[index] > self.packing.max_patches:
            return f"{self._patches[index]} patches do not fit into a pack of {self.packing.max_patches}"
        return ""

    def _encode_again(self, index: int) -> Sample:
        sample = self._encode(index)
        if len(sample.input_ids) != self.lengths[index]:
            raise VLBridgeError(
                f"{self._location(index)}: {len(sample.input_ids)} tokens, but {self.lengths[index]} when the dataset "
                "was created; its images have changed since then"
            )
        return sample

    def _encode(self, index: int) -> Sample:
        conversation = self.conversations[index]
        tools = conversation.tools if isinstance(conversation, FileConversation) else ()
        try:
            return encode_conversation(conversation, self.processor, tools=tools, media=self.media, labels=self.labels)
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
