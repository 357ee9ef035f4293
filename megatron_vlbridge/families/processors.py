"""The image and video processors of the families, by the name of their class in transformers."""

IMAGE_PROCESSORS = frozenset({"Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil"})
"""Those that resize as `data.media_tokens.image_grid` does."""

VIDEO_PROCESSORS = {"Qwen2VLVideoProcessor": False, "Qwen3VLVideoProcessor": True}
"""Those that sample and resize as `data.media_tokens` does -> whether their limits are for the pixels of all frames."""
