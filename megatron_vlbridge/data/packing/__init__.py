"""Which conversations share a pack, and the tensors of a pack."""
