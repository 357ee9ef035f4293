"""Before the first optimizer step: no stage trains without its images, with wrong positions, or on other packs."""
