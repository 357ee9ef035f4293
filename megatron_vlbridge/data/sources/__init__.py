"""Where conversations come from: files, their indices, and the formats of their records."""
