"""What is learned of a conversation: options, tools, special tokens in texts."""
