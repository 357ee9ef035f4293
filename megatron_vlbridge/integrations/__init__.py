"""Other training loops: pipeline schedules of torch and packs for models of transformers, frameworks on Megatron."""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_vlbridge.integrations.torch_guard import check_pipeline_media
from megatron_vlbridge.integrations.torch_pipeline import MediaStage, WholeBatch, media_kwargs
from megatron_vlbridge.integrations.transformers_batch import as_transformers_batch

if TYPE_CHECKING:
    from megatron_vlbridge.integrations.auto_bridge.bridge import AutoBridge

__all__ = ["AutoBridge", "MediaStage", "WholeBatch", "as_transformers_batch", "check_pipeline_media", "media_kwargs"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: only this one needs Megatron.
    if name != "AutoBridge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.auto_bridge.bridge").AutoBridge
