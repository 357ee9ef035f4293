"""The text of a video, in the form that Qwen3-VL was trained with.

A video of t merged frames is t times `<seconds><|vision_start|><|video_pad|>...<|vision_end|>`. The chat template
writes `<|vision_start|><|video_pad|><|vision_end|>` in its place. The processor of transformers 4.57, with which the
model was released, replaces all three tokens; since 5.10 it replaces `<|video_pad|>` alone, and the template's pair
stays around the frames.
"""

from transformers import ProcessorMixin


def without_outer_pair(text: str, processor: ProcessorMixin) -> str:
    """The chat template's text with `<|video_pad|>` alone for a video: every transformers then builds the same tokens.

    Call it between `apply_chat_template(..., tokenize=False)` and the processor, for inference too.

    Example:
        >>> without_outer_pair("<|vision_start|><|video_pad|><|vision_end|>What?", processor)  # doctest: +SKIP
        '<|video_pad|>What?'
    """
    start, video, end = processor.vision_start_token, processor.video_token, processor.vision_end_token
    return text.replace(f"{start}{video}{end}", video)
