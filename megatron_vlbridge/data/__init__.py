"""From conversations and pictures to packs of tokens."""
