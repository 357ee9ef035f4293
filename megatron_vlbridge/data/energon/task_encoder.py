"""Samples of Energon's crude WebDatasets as packs: cook, select, encode, pack."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import DEFAULT_LABELS, encode_conversation, measure_conversation
from megatron_vlbridge.data.chat import Sample as EncodedSample
from megatron_vlbridge.data.conversations import FileConversation, FileConversations
from megatron_vlbridge.data.dataset import check_processor
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.media import DEFAULTS
from megatron_vlbridge.data.packing.packs import best_fit, build_pack
from megatron_vlbridge.data.sources.files.shards import check_members_used, find_member, sample_record
from megatron_vlbridge.data.sources.forms.registry import AUTO, find_form
from megatron_vlbridge.data.sources.lazy import Records
from megatron_vlbridge.errors import VLBridgeError

try:
    from megatron.energon import Cooker, Sample, TaskEncoder, basic_sample_keys, edataclass, stateless
    from megatron.energon.errors import FatalSampleError
except ImportError as error:
    raise VLBridgeError(
        f"expected megatron-energon 7.4 or newer ({error}): install the extra, pip install 'megatron_vlbridge[energon]'"
    ) from error


@edataclass
class MeasuredConversation(Sample):
    """A conversation whose media are not decoded yet, and its number of tokens."""

    conversation: FileConversation
    length: int


@edataclass
class EncodedConversation(Sample):
    """An encoded conversation."""

    encoded: EncodedSample


@edataclass
class Pack(Sample):
    """The tensors of `packing.packs.build_pack`."""

    tensors: dict[str, Tensor]


class ConversationTaskEncoder(TaskEncoder):
    """Energon's task encoder for conversations: a micro-batch is one pack of `seq_length` tokens.

    A sample of a crude WebDataset is what `sources.files.shards` reads: a member `.json` in one of `NAMES` of
    `sources.forms.registry` (`form`, `columns`), and its images. The conversations of Energon's packing buffer are
    packed in their order (`packing.packs.best_fit`); their media are decoded after that. `multiple_of`, `media` and
    `labels` are those of `dataset.PackedConversations`.

    Where a conversation is invalid or does not fit into a pack the run ends with Energon's `FatalSampleError`, whose
    text names the shard and the sample; nothing is skipped.

    Raises VLBridgeError: the processor does not match the config, or there is no such form.

    Example: `ConversationTaskEncoder(processor, config, seq_length=4096)`; see `loader.PackLoader`.
    """

    # Media stay bytes: `media` decodes them.
    decoder = None

    def __init__(
        self,
        processor: ProcessorMixin,
        config: Config,
        *,
        seq_length: int,
        multiple_of: int = 1,
        form: str = AUTO,
        columns: object = None,
        media: MediaOptions = DEFAULTS,
        labels: LabelOptions = DEFAULT_LABELS,
    ) -> None:
        check_processor(processor, config)
        self.processor = processor
        self.seq_length, self.multiple_of = seq_length, multiple_of
        self.form, self.media, self.labels = find_form(form, columns), media, labels
        self.cookers = [Cooker(self.cook)]

    @stateless
    def cook(self, sample: dict[str, Any]) -> MeasuredConversation:
        """Read and measure the conversation of a crude sample."""
        try:
            records = _CrudeSample(sample)
            conversation = FileConversations(records, Path(), Path(), form=self.form)[0]
            length = len(self._call(measure_conversation, conversation).input_ids)
            if self._padded(length) > self.seq_length:
                raise VLBridgeError(
                    f"{conversation.location}: {length} tokens do not fit into a pack of {self.seq_length}; increase "
                    "--seq-length or shorten the conversation"
                )
        except VLBridgeError as error:
            raise FatalSampleError(str(error)) from error
        return MeasuredConversation(**basic_sample_keys(sample), conversation=conversation, length=length)

    def select_samples_to_pack(self, samples: list[MeasuredConversation]) -> list[list[MeasuredConversation]]:
        """Which conversations of a buffer share a pack."""
        packs = best_fit([self._padded(sample.length) for sample in samples], self.seq_length)
        return [[samples[place] for place in pack] for pack in packs]

    @stateless
    def postencode_sample(self, sample: MeasuredConversation) -> EncodedConversation:
        """Encode a conversation, with its media."""
        try:
            encoded = self._call(encode_conversation, sample.conversation)
            if len(encoded.input_ids) != sample.length:
                raise VLBridgeError(
                    f"{sample.conversation.location}: expected {sample.length} tokens, found {len(encoded.input_ids)}"
                )
        except VLBridgeError as error:
            raise FatalSampleError(str(error)) from error
        return EncodedConversation.derive_from(sample, encoded=encoded)

    @stateless
    def pack_selected_samples(self, samples: list[EncodedConversation]) -> Pack:
        """Concatenate the conversations of a pack."""
        encoded = [sample.encoded for sample in samples]
        tensors = build_pack(encoded, self.seq_length, self.processor.tokenizer.pad_token_id)
        return Pack.derive_from(samples[0], tensors=tensors)

    @stateless
    def batch(self, samples: list[Pack]) -> dict[str, Tensor]:
        """A pack as the micro-batch that `vlm_step` reads, with a leading dimension of 1."""
        (pack,) = samples
        return {name: tensor[None] for name, tensor in pack.tensors.items()}

    def _call(self, function: Any, conversation: FileConversation) -> Any:
        try:
            return function(
                conversation, self.processor, tools=conversation.tools, media=self.media, labels=self.labels
            )
        except VLBridgeError as error:
            raise VLBridgeError(f"{conversation.location}: {error}") from error

    def _padded(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of


class _CrudeSample(Records):
    """The record of one crude sample."""

    def __init__(self, sample: dict[str, Any]) -> None:
        (source,) = sample["__sources__"]
        self.name = f"{source.dataset_path}/{source.shard_name}, sample {sample['__key__']}"
        contents = [content for name, content in sample.items() if not name.startswith("__")]
        self._members = dict(zip(source.file_names, contents, strict=True))

    def __len__(self) -> int:
        return 1

    def item(self, index: int) -> Any:
        return sample_record(self._members)

    def location(self, index: int) -> str:
        return self.name

    def media(self, index: int, source: str, folder: Path) -> bytes:
        found = find_member(self._members, source)
        if found is None:
            raise VLBridgeError(f"expected a member {source!r}, found {', '.join(self._members)}")
        return found

    def check_used(self, index: int, sources: Collection[str]) -> None:
        check_members_used(self._members, sources)
