"""What is in the data: counts, lengths, failures, and samples with their supervised tokens."""
