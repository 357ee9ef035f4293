"""A real Qwen3-VL processor, built from a list of words without any download: for the demo and the tests."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from megatron_vlbridge.errors import VLBridgeError

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEMPORAL_PATCH_SIZE = 2
# A video may hold as many pixels as this many images.
VIDEO_IMAGES = 16

# What a word is before merging, as in the published Qwen tokenizers: a letter run with one sign before it, single
# digits, signs with the line breaks after them, line breaks, blanks.
WORD = r"(?i:'[sdmt]|'ll|'ve|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def build_processor(
    words: Iterable[str], *, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> Qwen3VLProcessor:
    """A `Qwen3VLProcessor` whose tokenizer has one token for each word, with and without a blank before it.

    The tokenizer is a byte-level BPE, so any other text is encoded too, in more tokens; `len(processor.tokenizer)` is
    its vocabulary. A image is resized to between `min_pixels` and `max_pixels` pixels, sides a multiple of
    `patch_size * merge_size`. The same arguments give the same processor. It can be saved with `save_pretrained` and
    loaded with `AutoProcessor`.

    Raises VLBridgeError: `max_pixels` is less than one merged patch, or than `min_pixels`.

    Example: `build_processor(["seven"], patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)`.
    """
    smallest = (patch_size * merge_size) ** 2
    if not max(smallest, min_pixels) <= max_pixels:
        raise VLBridgeError(
            f"max_pixels: expected at least min_pixels = {min_pixels} and one merged patch = {smallest}, found "
            f"{max_pixels}"
        )
    sizes = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": TEMPORAL_PATCH_SIZE}
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            **sizes, **colours, size={"shortest_edge": min_pixels, "longest_edge": max_pixels}
        ),
        video_processor=Qwen3VLVideoProcessor(
            **sizes,
            **colours,
            size={"shortest_edge": min_pixels, "longest_edge": VIDEO_IMAGES * max_pixels},
            cap_pixels_per_frame=False,
        ),
        tokenizer=_tokenizer(words),
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    corpus = [form for word in ["system", "user", "assistant", "seconds", *words] for form in (word, f" {word}")]
    special = [PAD, TURN_START, TURN_END, *VISION_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        # More than all merges can need, so that every word ends as one token.
        vocab_size=len(special) + len(alphabet) + sum(len(form.encode()) for form in corpus),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[token for token in special if token not in (PAD, TURN_END)],
    )
