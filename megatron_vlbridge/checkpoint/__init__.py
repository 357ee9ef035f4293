"""Checkpoint files: readers, streaming writers, import and export, and loading into a live model."""
