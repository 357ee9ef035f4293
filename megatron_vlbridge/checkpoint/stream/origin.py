"""What a result is made from and how, in JSON's types: noted beside it, and compared before work is continued."""

from typing import Any

_FORMER_OPTIONS = {"--leave-out": "--ignore"}


def current(origin: Any) -> Any:
    """An origin that an earlier version may have noted, with the options' present names."""
    options = origin.get("options") if isinstance(origin, dict) else None
    if not isinstance(options, dict):
        return origin
    return {**origin, "options": {_FORMER_OPTIONS.get(name, name): value for name, value in options.items()}}


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """The first place in which two origins differ, for people. Options have the names of the command line."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key):
                inner = f"{where}.{key}" if where not in ("", "options") else str(key)
                return first_difference(before.get(key), now.get(key), inner)
    return f"{where or 'origin'} {_shown(now)} where it was {_shown(before)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.120}"
