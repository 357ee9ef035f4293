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
from megatron_vlbridge.data.packing.selection import PackLimits, Selection
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
    created, without decoding media. `__getitem__` encodes; a sample whose tokens or patches have changed fails.

    The conversations have the format of `chat.encode_conversation`; `processor` and `config` are those of one
    checkpoint. A pack has `seq_length` tokens. The length of a conversation in it is rounded up to a multiple of
    `multiple_of`, for context-parallel padding: 2 * the context-parallel size if that is above 1. The space is
    reserved; the tensors are unpadded. `media` says how images and frames are read, `labels` what is learned, `packing`
    how packs are formed.

    `selection` (see `packing.selection.Selection`) has what is left out, cut or not learned, with reports, which are
    logged on rank 0 if `log`: assistant turns excluded from the loss (see `chat.encode_conversation`) or not to be
    learned; conversations that fit into no pack, with `too_long="drop"`, or "truncate", with which they end after the
    last assistant message to be learned with which they fit; and those that cannot be measured, where `max_bad_samples`
    allows it. At most this share of the conversations may fail to be encoded. One that fails when its media are decoded
    is replaced in its pack (see `packing.replacement`), and logged if `log`.

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
        log: bool = True,
    ) -> None:
        check_processor(processor, config)
        if not conversations:
            raise VLBridgeError("conversations: expected at least one, found none")
        self.processor = processor
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.media = media
        self.labels = labels
        self.packing = packing
        self.decode_media = decode_media
        self._memory = PatchMemory(raise_trim_threshold=True)
        measure = Measure(processor, config.vision.hidden_size, media, labels)
        table = lengths or measure(conversations, range(len(conversations)))
        if len(table.rows) != len(conversations):
            raise VLBridgeError(
                f"lengths: expected those of {len(conversations)} conversations, found {len(table.rows)}"
            )
        limits = PackLimits(seq_length, multiple_of, packing.max_patches)
        self.selection = Selection(conversations, table, measure, limits, packing.too_long, max_bad_samples)
        self.conversations, rows = self.selection.conversations, self.selection.rows
        self.lengths, self.patches, self.work = rows["tokens"], rows["patches"], rows["work"]
        self.replacements = Replacements(self.lengths, self.patches, seed=seed, max_share=max_bad_samples, log=log)
        whole = [Share(0, len(conversations), Fraction(1))]
        self.shares = conversations.shares if isinstance(conversations, Mixture) else whole
        self.source_names = source_names(conversations)
        self.plan = EpochPlan(
            rows, self.selection.kept, self.shares, packing, seq_length=seq_length, multiple_of=multiple_of, seed=seed
        )
        if log and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            for report in self.selection.reports:
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

    def _write(self, pack: int, member: int, writer: PackWriter) -> bool:
        """Add the sample of a conversation of a pack, or that of its replacement; whether it is one.

        Samples are not collected: without the patches of the one before, the next one has its memory.
        """
        self.replacements.note_read()
        sample, replaced = self._encode_or_replace(pack, member)
        writer.add(sample)
        return replaced

    def _encode_or_replace(self, pack: int, member: int) -> tuple[Sample, bool]:
        try:
            return self._encode(member), False
        except VLBridgeError as error:
            self.replacements.note_failure(member, error)
            # A variable with the error would be a cycle with this frame, and keep all of its callers' memory.
            for candidate in self.replacements.candidates(pack, member):
                with suppress(VLBridgeError):
                    return self._encode(candidate), True
            raise

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
