"""Conversations, images and videos to packs of tokens."""
