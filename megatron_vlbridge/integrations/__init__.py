"""Other training loops for models of transformers: pipeline schedules of torch, and packs."""

from megatron_vlbridge.integrations.torch_guard import check_pipeline_media
from megatron_vlbridge.integrations.torch_pipeline import MediaStage, WholeBatch, media_kwargs
from megatron_vlbridge.integrations.transformers_batch import as_transformers_batch

__all__ = ["MediaStage", "WholeBatch", "as_transformers_batch", "check_pipeline_media", "media_kwargs"]
