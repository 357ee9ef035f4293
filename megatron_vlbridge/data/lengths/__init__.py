"""The sizes of encoded conversations, measured without decoding media, kept in a file beside the data."""
