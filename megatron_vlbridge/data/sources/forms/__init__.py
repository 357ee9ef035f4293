"""Formats of records; each is converted to the messages form."""
