"""Other training loops: pipeline schedules of `torch.distributed.pipelining` for models of transformers."""

from megatron_vlbridge.integrations.torch_guard import check_pipeline_media
from megatron_vlbridge.integrations.torch_pipeline import MediaStage, WholeBatch, media_kwargs

__all__ = ["MediaStage", "WholeBatch", "check_pipeline_media", "media_kwargs"]
