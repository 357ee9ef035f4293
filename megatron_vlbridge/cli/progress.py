"""Progress of a conversion on stderr."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_vlbridge.cli.output import show

if TYPE_CHECKING:
    from megatron_vlbridge.checkpoint.stream.engine import Progress


class Meter:
    """One line that is rewritten on a terminal, a line per tenth elsewhere, JSON if asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self._json, self._terminal, self._tenth = as_json, sys.stderr.isatty(), 0

    def __call__(self, progress: "Progress") -> None:
        """Show how far a run has come."""
        if self._json:
            show(json.dumps(asdict(progress)), stream=sys.stderr)
            return
        share = progress.done / progress.total if progress.total else 1.0
        left = f"{duration(progress.seconds_left)} left" if progress.done < progress.total else "done"
        line = f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB, {progress.rate / 1e6:.0f} MB/s, {left}"
        if self._terminal:
            end = "\n" if progress.done == progress.total else ""
            show(f"\r{share:4.0%} {line}\x1b[K", end=end, stream=sys.stderr)
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            show(f"{share:4.0%} {line}", stream=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds for people: `3 min 05 s`."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
