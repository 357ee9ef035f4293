"""The prompt text of a video, in the format that Qwen3-VL was trained with.

A video of t merged frames is t times `<seconds><|vision_start|><|video_pad|>...<|vision_end|>`. The chat template
emits `<|vision_start|><|video_pad|><|vision_end|>` as its placeholder. The processor of transformers 4.57, with which
the model was released, replaces all three tokens; since 5.10 it replaces only `<|video_pad|>`, and the template's
start and end tokens remain around the frames.
"""

from collections.abc import Sequence

from transformers import ProcessorMixin

from megatron_vlbridge.families.processors import VIDEO_PROCESSORS


def without_outer_pair(text: str, processor: ProcessorMixin) -> str:
    """Reduce each video placeholder to `<|video_pad|>`, so that every transformers version builds the same tokens.

    Only for processors that write the time before each frame; those of Qwen2.5-VL keep start and end around a video.
    Call it between `apply_chat_template(..., tokenize=False)` and the processor, also for inference.

    Example: `without_outer_pair("<|vision_start|><|video_pad|><|vision_end|>What?", processor)` is
    `'<|video_pad|>What?'`.
    """
    if not VIDEO_PROCESSORS.get(type(processor.video_processor).__name__, True):
        return text
    start, video, end = processor.vision_start_token, processor.video_token, processor.vision_end_token
    return text.replace(f"{start}{video}{end}", video)


def timestamps(frame_indices: Sequence[int], fps: float, temporal_patch_size: int) -> list[str]:
    """The text before each temporal patch: the mean time of its first and its last frame.

    `fps` is that of the file, whose frames `frame_indices` counts; the last frame is repeated to fill a patch.

    Example: `timestamps([0, 2, 4], fps=2, temporal_patch_size=2)` is `["<0.5 seconds>", "<2.0 seconds>"]`.
    """
    frames = [*frame_indices, *[frame_indices[-1]] * (-len(frame_indices) % temporal_patch_size)]
    pairs = zip(frames[::temporal_patch_size], frames[temporal_patch_size - 1 :: temporal_patch_size], strict=True)
    return [f"<{(first / fps + last / fps) / 2:.1f} seconds>" for first, last in pairs]
