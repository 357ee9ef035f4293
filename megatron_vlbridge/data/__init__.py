"""From conversations and pictures to packs of tokens; and the small real data that ships with the project."""
