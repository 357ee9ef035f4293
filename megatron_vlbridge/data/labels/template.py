"""The messages as a chat template gets them, and its text."""

from typing import Any

from jinja2 import TemplateError

from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import message_calls, message_name, message_text
from megatron_vlbridge.data.processors.interface import ConversationProcessor
from megatron_vlbridge.errors import VLBridgeError


def render(messages: Conversation, processor: ConversationProcessor, **variables: Any) -> str:
    """Apply the processor's chat template to the conversation (VLBridgeError if the template raises an error)."""
    try:
        return processor.render(messages, **variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise VLBridgeError(f"the chat template rejects the conversation: {error}") from error


def template_messages(messages: Conversation) -> Conversation:
    """The messages as every published chat template renders them alike.

    Assistant content is one string: Qwen3-VL writes a newline between a list and tool calls, also if its texts are
    empty. Arguments of calls are objects: Qwen3.5 takes no JSON text. If one message has `reasoning_content`, the
    others have `""`, no reasoning: otherwise templates read an answer up to a `</think>` in it as reasoning.
    """
    structured = any(message.get("reasoning_content") is not None for message in messages)
    rendered: Conversation = []
    for message in messages:
        one = {"role": message["role"], "content": message.get("content")}
        if message["role"] == "assistant":
            one["content"] = message_text(message, {})
            calls = [{"name": call.name, "arguments": call.arguments} for call in message_calls(message)]
            if calls:
                one["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            if structured:
                one["reasoning_content"] = message.get("reasoning_content") or ""
        rendered.append(one)
    return rendered


def check_reasoning(messages: Conversation, processor: ConversationProcessor) -> None:
    """Check that reasoning is written in one way, and that the chat template renders `reasoning_content`.

    Raises VLBridgeError: the content of a message starts with `<think>`, and this or another has `reasoning_content`;
    the template drops it in every turn.
    """
    structured = next((i for i, message in enumerate(messages) if message.get("reasoning_content") is not None), None)
    for index, message in enumerate(messages) if structured is not None else ():
        if message["role"] == "assistant" and message_text(message, {}).lstrip().startswith("<think>"):
            raise VLBridgeError(
                f"{message_name(messages, index)}: the content starts with '<think>', but message {structured} has "
                "'reasoning_content'; write all reasoning under 'reasoning_content'"
            )
    first = next((index for index, message in enumerate(messages) if message.get("reasoning_content")), None)
    answer = {"role": "assistant", "content": "x", "reasoning_content": "vlbridge"}
    if first is not None and "vlbridge" not in render([{"role": "user", "content": "x"}, answer], processor):
        raise VLBridgeError(
            f"{message_name(messages, first)}: the chat template does not render 'reasoning_content'; write the "
            r"reasoning at the start of the content, as '<think>\n...\n</think>\n\n...'"
        )
