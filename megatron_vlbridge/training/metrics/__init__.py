"""What a training run counts and measures: the parts of its packs, FLOPs, losses; a CSV file of them, and its plot."""
