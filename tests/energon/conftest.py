"""The small processor and config of the map-style dataset's tests."""

from tests.unit.test_dataset import config, processor

__all__ = ["config", "processor"]
