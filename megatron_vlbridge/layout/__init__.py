"""Where a token lives: index arithmetic on torch alone."""
