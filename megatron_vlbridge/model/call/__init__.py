"""The forms in which `Qwen3VLModel.forward` is called, by this project and by other frameworks."""
