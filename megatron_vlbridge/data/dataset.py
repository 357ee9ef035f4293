"""A map-style dataset of packed conversations."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import DEFAULT_LABELS, Sample, encode_conversation, measure_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.lengths.measure import Measure, encode_located, location
from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.data.media import DEFAULTS, Conversation
from megatron_vlbridge.data.packing.epochs import EpochPlan
from megatron_vlbridge.data.packing.offline import PackingOptions
from megatron_vlbridge.data.packing.pack_writer import PackWriter
from megatron_vlbridge.data.packing.patch_memory import PatchMemory
from megatron_vlbridge.data.packing.replacement import Replacements
from megatron_vlbridge.data.packing.truncation import truncate
from megatron_vlbridge.data.processors.interface import ConversationProcessor
from megatron_vlbridge.data.sources.mixture import Mixture, source_names
from megatron_vlbridge.data.sources.sampling import Share
from megatron_vlbridge.errors import VLBridgeError

DEFAULT_PACKING = PackingOptions()

__all__ = ["PackedConversations", "check_processor", "read_conversations"]

logger = logging.getLogger(__name__)


class PackedConversations(Dataset[dict[str, Tensor]]):
    """A map-style dataset of `num_samples` packs; item i is a pure function of the conversations, the seed and i.

    Each epoch shuffles the conversations and packs them again (see `packing.offline.PackingOptions`), so every
    conversation occurs once per epoch, together with different ones; one of a `Mixture` as often as its weight says.
    Item i has the same tensors (see `packing.packs.build_pack`) in every process, worker and resumed run, and with
    `max_bad_samples` above 0 `replaced_per_source`, int64 `[sources]`: how many of its conversations were replaced.

    The lengths are `lengths`, a table that was built before (see `lengths.build`), or else measured when the dataset is
    created, without decoding media. `__getitem__` encodes, and raises an error if a length has changed. Assistant turns
    excluded from the loss (see `chat.encode_conversation`) are counted in `num_assistant_turns` and
    `num_excluded_turns`, and `excluded_turns_report` describes them; rank 0 logs it as a warning.

    The conversations have the format of `chat.encode_conversation`; `processor` and `config` are those of one
    checkpoint. A pack has `seq_length` tokens. The length of a conversation in it is rounded up to a multiple of
    `multiple_of`, for context-parallel padding: 2 * the context-parallel size if that is above 1. The space is
    reserved; the tensors are unpadded. `media` says how images and frames are read, `labels` what is learned
    (`num_skipped_turns` assistant turns are not), `packing` how packs are formed.
    With `too_long="drop"` conversations that fit into no pack are left out: `dropped` has their indices,
    `dropped_report` describes them; rank 0 logs it. With "truncate" they end after the last assistant message to be
    learned with which they fit, and only those without one are dropped: `truncated` has the number of messages that are
    left of each.

    At most the share `max_bad_samples` of the conversations may fail to be encoded. Those that already cannot be
    measured are left out: `failed` has their indices, and rank 0 logs `failed_report`. One that fails later, when its
    media are decoded, is replaced in its pack (see `packing.replacement`), and logged if `log_replaced`.

    With `decode_media=False` packs have no patches, and are else the same: for a pipeline stage without the vision
    tower (see `training.launch.data.decodes_media`). Only the headers of files are read.

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
        lengths: LengthTable | None = None,
        max_bad_samples: float = 0,
        decode_media: bool = True,
        log_replaced: bool = True,
    ) -> None:
        check_processor(processor, config)
        if not conversations:
            raise VLBridgeError("conversations: expected at least one, found none")
        self.processor = processor
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed
        self.multiple_of = multiple_of
        self.media = media
        self.labels = labels
        self.packing = packing
        self.decode_media = decode_media
        self._memory = PatchMemory()
        measure = Measure(processor, config.vision.hidden_size, media, labels)
        table = lengths or measure(conversations, range(len(conversations)))
        if len(table.rows) != len(conversations):
            raise VLBridgeError(
                f"lengths: expected those of {len(conversations)} conversations, found {len(table.rows)}"
            )
        self.conversations = conversations
        self.truncated: dict[int, int] = {}
        if packing.too_long == "truncate":
            indices = self._too_long(table.rows).nonzero()[0].tolist()
            cut = truncate(conversations, table, measure, indices, lambda row: not self._too_long(row))
            self.conversations, table, self.truncated = cut.conversations, cut.table, cut.kept
        self.lengths = table.rows["tokens"]
        self.patches, self.work = table.rows["patches"], table.rows["work"]
        self.replacements = Replacements(
            self.lengths, self.patches, seed=seed, max_share=max_bad_samples, log=log_replaced
        )
        self._first_failed = table.first_failed.text if table.first_failed else ""
        self.failed = self._find_failed()
        self.dropped = self._find_too_long()
        kept = np.setdiff1d(np.arange(len(conversations)), [*self.failed, *self.dropped])
        if not len(kept):
            raise VLBridgeError(f"conversations: expected at least one that fits into a pack; {self.dropped_report}")
        self.kept, self.kept_rows = kept, table.rows[kept]
        self.num_assistant_turns = int(self.kept_rows["assistant_turns"].sum())
        self.num_excluded_turns = int(self.kept_rows["excluded_turns"].sum())
        self.num_skipped_turns = int(self.kept_rows["skipped_turns"].sum())
        self._first_excluded_turn = table.first_excluded.text if table.first_excluded else ""
        whole = [Share(0, len(conversations), Fraction(1))]
        self.shares = conversations.shares if isinstance(conversations, Mixture) else whole
        self.source_names = source_names(conversations)
        self.plan = EpochPlan(
            table.rows, kept, self.shares, packing, seq_length=seq_length, multiple_of=multiple_of, seed=seed
        )
        turns = self.excluded_turns_report, self.skipped_turns_report
        for report in filter(None, (*turns, self.truncated_report, self.dropped_report, self.failed_report)):
            if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
                logger.warning(report)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        members = self.members(index)
        writer = PackWriter(
            self.seq_length, self.processor.tokenizer.pad_token_id, int(self.patches[members].sum()), self._memory
        )
        replaced = [self._write(index, member, writer) for member in members]
        pack = writer.tensors()
        if self.replacements.max_share:
            sources = np.searchsorted([share.end for share in self.shares], np.array(members)[replaced], "right")
            pack["replaced_per_source"] = torch.from_numpy(np.bincount(sources, minlength=len(self.shares)))
        return pack

    def members(self, index: int) -> list[int]:
        """The indices of the conversations in pack `index`, in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"pack {index} is out of range for a dataset of {self.num_samples} packs")
        return self.plan.members(index)

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, each as a list of conversation indices."""
        return self.plan.epoch_packs(epoch)

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
    def truncated_report(self) -> str:
        """The number of conversations that were truncated, and the first of them; empty if there are none."""
        if not self.truncated:
            return ""
        index = min(self.truncated)
        first = f"{location(self.conversations[index], index)}: {self.truncated[index]} messages are left"
        return f"{len(self.truncated)} of {len(self.lengths)} conversations are truncated (first: {first})"

    @property
    def dropped_report(self) -> str:
        """The number of conversations that were dropped, and the first of them; empty if there are none."""
        if not self.dropped:
            return ""
        first = self._excess(self.dropped[0])
        return f"{len(self.dropped)} of {len(self.lengths)} conversations are dropped (first: {first})"

    @property
    def failed_report(self) -> str:
        """The number of conversations that cannot be measured, and the first of them; empty if there are none."""
        if not self.failed:
            return ""
        return (
            f"{len(self.failed)} of {len(self.lengths)} conversations cannot be encoded (first: {self._first_failed})"
        )

    @property
    def _padded_lengths(self) -> np.ndarray:
        return -(-self.lengths // self.multiple_of) * self.multiple_of

    def _find_failed(self) -> list[int]:
        """The indices of the conversations that could not be measured; an error if they are too many."""
        found: list[int] = (self.lengths == 0).nonzero()[0].tolist()
        share = self.replacements.max_share
        if found and not share:
            raise VLBridgeError(self._first_failed)
        if len(found) > share * len(self.lengths):
            raise VLBridgeError(
                f"{len(found)} of {len(self.lengths)} conversations cannot be encoded, more than --max-bad-samples "
                f"{share}; the first: {self._first_failed}"
            )
        return found

    def _find_too_long(self) -> list[int]:
        """The indices of the conversations that fit into no pack; an error unless they are dropped."""
        rows = {"tokens": self.lengths, "patches": self.patches}
        found: list[int] = self._too_long(rows).nonzero()[0].tolist()
        if found and self.packing.too_long == "error":
            raise VLBridgeError(
                f"{self._excess(found[0])}; increase the limit, shorten the conversation, scale its images down, or "
                "drop or truncate it (--long-conversations drop or truncate)"
            )
        return found

    def _too_long(self, rows: Any) -> Any:
        """Which rows of a table of lengths, or whether a single one, exceed a limit of a pack."""
        too_long = -(-rows["tokens"] // self.multiple_of) * self.multiple_of > self.seq_length
        if self.packing.max_patches is not None:
            too_long |= rows["patches"] > self.packing.max_patches
        return too_long

    def _excess(self, index: int) -> str:
        """The limit that a conversation alone exceeds, and where it is."""
        where = location(self.conversations[index], index)
        if self._padded_lengths[index] > self.seq_length:
            return f"{where}: {self.lengths[index]} tokens do not fit into a pack of {self.seq_length}"
        return f"{where}: {self.patches[index]} patches do not fit into a pack of {self.packing.max_patches}"

    def _write(self, pack: int, member: int, writer: PackWriter) -> bool:
        """Add the sample of a conversation of a pack, or that of its replacement; whether it is one.

        Samples are not collected: without the patches of the one before, the next one has its memory.
        """
        self.replacements.note_read()
        try:
            writer.add(self._encode(member))
            return False
        except VLBridgeError as error:
            self.replacements.note_failure(member, error)
            failure = error
        for candidate in self.replacements.candidates(pack, member):
            with suppress(VLBridgeError):
                writer.add(self._encode(candidate))
                return True
        raise failure

    def _encode(self, index: int) -> Sample:
        conversation = self.conversations[index]
        options: dict[str, Any] = {"media": self.media, "labels": self.labels}
        if self.decode_media:
            sample = encode_located(encode_conversation, conversation, index, self.processor, **options)
        else:
            measured = encode_located(measure_conversation, conversation, index, self.processor, **options)
            sample = measured.without_patches()
        grids = torch.cat([sample.image_grid_thw, sample.video_grid_thw])
        found = len(sample.input_ids), int(grids.prod(1).sum())
        expected = int(self.lengths[index]), int(self.patches[index])
        if found != expected:
            raise VLBridgeError(
                f"{location(conversation, index)}: {found[0]} tokens and {found[1]} patches, but {expected[0]} and "
                f"{expected[1]} when it was measured; its text or media have changed since then"
            )
        return sample


def check_processor(processor: ProcessorMixin | ConversationProcessor, config: Config) -> None:
    """Check that the tokens and patches of a processor match the checkpoint (VLBridgeError with both values)."""
    if isinstance(processor, ConversationProcessor):
        raise VLBridgeError(
            f"processor {type(processor).__name__}: expected a processor of transformers, the one of the checkpoint; "
            "others are for encode_conversation"
        )
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
