"""The vision tower, and how its frames are spread over the context-parallel ranks."""
