"""What `vlbridge --version` prints."""

import importlib.metadata

_NAMED = ("megatron-core", "torch", "transformers")


def versions() -> str:
    """This package's version, and those of the packages that a report of a fault should name. Imports none of them."""
    others = ", ".join(f"{name} {_version(name)}" for name in _NAMED)
    return f"vlbridge {_version('megatron-vlbridge')} ({others})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
