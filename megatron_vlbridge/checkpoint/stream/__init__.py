"""Results written in parts: blocks of bounded memory, staging, resumption and checksums."""
