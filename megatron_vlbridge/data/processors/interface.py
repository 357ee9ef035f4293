"""The interface between conversations and a processor: turns, placeholders, token counts and patches."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import Conversation, MediaShape
from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True)
class TurnFormat:
    r"""How a rendered conversation delimits its turns: a start token, the role, `separator`, the content, `end`.

    `name` is for errors. `starts` are the start tokens of all roles, `assistant` is the text before the content of an
    assistant turn. Starts and `end` must be single tokens of the tokenizer.

    Example: ChatML is
    `TurnFormat("ChatML", ("<|im_start|>",), "\n", "<|im_end|>", "<|im_start|>assistant\n")`.
    """

    name: str
    starts: tuple[str, ...]
    separator: str
    end: str
    assistant: str


CHATML = TurnFormat("ChatML", ("<|im_start|>",), "\n", "<|im_end|>", "<|im_start|>assistant\n")


class ConversationProcessor(ABC):
    """What `chat.encode_conversation` calls; subclass it for a processor that is not in `families.processors`.

    See docs/processors.md.

    Kinds of media are "image" and "video"; one that `placeholders` does not have is rejected.

    - `tokenizer`: of transformers, with the tokens of `turn_format` and `media_tokens` as special tokens
    - `turn_format`: how turns are delimited
    - `placeholders`: for each kind, the text that `render` writes for one image or video; it has the token of
      `media_tokens` once
    - `media_tokens`: for each kind, the token that is repeated for an image or video, a different one for each kind
    - `patch_shapes`: for each kind, the shape of one patch
    - `prompt_variables`: the variables of the chat template with which it renders different generation prompts

    Example: `tests/other_processor.py`, a processor whose placeholders are expanded before it is called.
    """

    tokenizer: PreTrainedTokenizerBase
    turn_format: TurnFormat
    placeholders: Mapping[str, str]
    media_tokens: Mapping[str, str]
    patch_shapes: Mapping[str, tuple[int, ...]]
    prompt_variables: Sequence[Mapping[str, Any]] = ({},)

    @abstractmethod
    def render(self, messages: Conversation, **variables: Any) -> str:
        """The text of the chat template; `variables` are its own (`add_generation_prompt`, `tools`)."""

    @abstractmethod
    def measure(self, part: dict[str, Any], options: MediaOptions) -> MediaShape:
        """The grid of the image or video of a content part, from its size alone (see `media.media_shape`)."""

    @abstractmethod
    def expand(self, kind: str, shape: MediaShape) -> str:
        """The text in place of the token of `media_tokens` for an image or video: the token, repeated."""

    @abstractmethod
    def load(self, part: dict[str, Any], options: MediaOptions) -> Any:
        """The image or video of a content part, decoded, in the form that `encode` takes."""

    @abstractmethod
    def encode(self, texts: Sequence[str], images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """The tokens of each text, `input_ids`, a list of int64 `[L]`, and the patches of the media.

        Media are in order. Texts have placeholders as `render` writes them. Where there are images, the result also
        has `pixel_values` float32 `[P, *patch_shape]` and `image_grid_thw` int64 `[n, 3]`; for videos,
        `pixel_values_videos` and `video_grid_thw`.
        """

    def check_tokens(self, ids: Tensor, grids: Mapping[str, Tensor]) -> None:
        """Check that the tokens `[L]` have those that `expand` gives the grids `[n, 3]` of each kind.

        Raises VLBridgeError: with the kind and both numbers.
        """
        for kind, token in self.media_tokens.items():
            shapes = [MediaShape((frames, rows, columns), []) for frames, rows, columns in grids[kind].tolist()]
            expected = sum(self.expand(kind, shape).count(token) for shape in shapes)
            found = int((ids == self.tokenizer.convert_tokens_to_ids(token)).sum())
            if found != expected:
                raise VLBridgeError(
                    f"{kind}: expected {expected} tokens {token}, those of the grids {grids[kind].tolist()}, "
                    f"found {found}"
                )

    def expand_texts(self, texts: Sequence[str], shapes: Mapping[str, Sequence[MediaShape]]) -> list[str]:
        """The texts with each token of `media_tokens` replaced by that of `expand`.

        Example: `processor.expand_texts(["<|media_pad|>"], {"image": [MediaShape((1, 4, 4), [])]})`.
        """
        kinds = {token: kind for kind, token in self.media_tokens.items()}
        remaining = {kind: iter(found) for kind, found in shapes.items()}
        tokens = re.compile("|".join(map(re.escape, kinds)))

        def text(match: re.Match[str]) -> str:
            kind = kinds[match[0]]
            return self.expand(kind, next(remaining[kind]))

        return [tokens.sub(text, one) for one in texts]
