"""Conversations, images and videos to packs of tokens; and the small real data set of the demo."""
