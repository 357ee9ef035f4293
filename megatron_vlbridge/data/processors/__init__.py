"""What encoding a conversation needs of a processor: the published ones, and an interface for others."""
