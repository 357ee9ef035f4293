"""Random access to the records of files."""
