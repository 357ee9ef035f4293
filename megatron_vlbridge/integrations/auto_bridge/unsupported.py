"""What Megatron-Bridge has and this package does not offer: rejected with what to use instead."""

from typing import Any

from megatron_vlbridge.errors import VLBridgeError

_INSTEAD = {
    "save_megatron_model": "Import the Hugging Face folder with import_ckpt, or save with Megatron's own saver.",
    "export_adapter_ckpt": "Use `vlbridge export --adapter`.",
    "push_to_hub": "Save with save_hf_pretrained and upload the folder.",
    "_model_bridge": "Use load_hf_weights, export_hf_weights and get_conversion_tasks, which convert whole models.",
    "transformer_layer_spec": "The layers are those that the tests compare with transformers; they cannot be replaced.",
}


class NotOfferedError(VLBridgeError, AttributeError):
    """A name of Megatron-Bridge that is not offered; `hasattr` and `getattr` with a default work as for any other."""


def not_offered(owner: str, name: str) -> NotOfferedError:
    """The error for an attribute or keyword of `owner`, with what to use instead where that is known."""
    return NotOfferedError(
        f"{owner}: expected a name that is offered, found {name!r}. "
        f"{_INSTEAD.get(name, 'Correct it or leave it out: it would have no effect.')}"
    )


def reject_keywords(owner: str, **given: object) -> None:
    """Reject keywords of `owner` that are set: they would change the result and are not offered."""
    for name, value in given.items():
        if value not in (None, False, (), []):
            raise VLBridgeError(f"{owner}: {name}={value!r:.80} is not offered. Leave it out.")


def check_same_adapter(settings: Any, peft_config: object) -> None:
    """Reject a config of Megatron-Bridge's adapters whose rank or alpha is not that of `settings`, those of a model."""
    for name, found in () if settings is None else (("dim", settings.rank), ("alpha", settings.alpha)):
        asked = getattr(peft_config, name, found)
        if asked != found:
            raise VLBridgeError(
                f"save_hf_adapter: peft_config.{name}: expected {found:g}, that of the adapters, found {asked}. Give "
                "their config, or None."
            )
