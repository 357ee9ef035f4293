"""Energon as the reader, in `.venv-energon`: see `make test-energon`."""
