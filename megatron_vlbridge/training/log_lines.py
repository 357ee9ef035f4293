"""Parse Megatron's log, line by line, for the short log. Written for Megatron-Core 0.19."""

import re
from dataclasses import dataclass, field

from megatron_vlbridge.training.metrics.columns import MEASURED

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*(\d+) \|(.*)")
_VALIDATION = re.compile(r"\bvalidation(\S*) loss at (.+?) \|(.*)")
_SAVED = re.compile(r"\bsuccessfully saved (?:local )?checkpoint from iteration\s+(\d+)(?: to (.+) \[)?")
_LOADED = re.compile(r"\bsuccessfully loaded checkpoint from (.+) \[.*\] at iteration (\d+)")
_STOPPED = re.compile(r"\bexiting program after receiving SIGTERM\b")
# Lines that are printed unchanged: warnings, and why Megatron stops.
_IMPORTANT = re.compile(
    r"\b(warning|error|exception|fail(ed|ure)?|invalid|could not|unable|exiting|terminat\w+|skipping|ignored|nan)\b",
    re.IGNORECASE,
)
# Except arguments, whose values may contain such a word, lines printed at every start, and that an imported checkpoint
# has no arguments of a run.
_UNIMPORTANT = re.compile(
    r"^  \w+ \.* |one_logger package is required|could not find the metadata file"
    r"|[TP]P size not found in checkpoint args|could not find arguments in the checkpoint"
)


@dataclass(frozen=True)
class Iteration:
    """Megatron's log line of an iteration; losses are means since the previous line, in nats per token.

    `losses` have Megatron's names and order; a NaN loss is missing, as in Megatron's line. `skipped` and `nan` count
    the iterations since the previous line whose gradients, or whose loss, were not finite. `measured` has what
    `training.metrics` added to the line, by column.
    """

    number: int
    last: int
    seconds: float
    global_batch_size: int
    losses: dict[str, float]
    grad_norm: float | None
    loss_scale: float
    skipped: int
    nan: int
    learning_rate: float | None = None
    measured: dict[str, float] = field(default_factory=dict)

    def text(self, seq_length: int, seconds_left: float | None) -> str:
        """Format as one line.

        Example: `iteration.text(4096, 3725.0)` is
        `'iteration   3/400  loss 2.345600  grad norm 1.234  12,345 tokens/s  1 h 02 min left'`.
        """
        parts = [f"iteration {self.number:{len(str(self.last))}}/{self.last}"]
        losses = self.losses if "lm loss" in self.losses else {"lm loss": float("nan"), **self.losses}
        parts += [f"{name.removeprefix('lm ')} {_digits(value)}" for name, value in losses.items()]
        if self.grad_norm is not None:
            parts.append(f"grad norm {self.grad_norm:.3f}")
        if self.loss_scale != 1.0:
            parts.append(f"loss scale {self.loss_scale:g}")
        if self.skipped:
            parts.append(f"{self.skipped} skipped (gradients not finite)")
        if self.nan:
            parts.append(f"{self.nan} with a loss that is not finite")
        rate = self.measured.get("tokens_per_second", seq_length * self.global_batch_size / self.seconds)
        parts.append(f"{rate:,.0f} tokens/s")
        if "model_tflops_per_rank" in self.measured:
            parts.append(f"{self.measured['model_tflops_per_rank']:.3g} TFLOP/s per rank")
        if seconds_left is not None and self.number < self.last:
            parts.append(f"{duration(seconds_left)} left")
        if self.measured:
            parts.append(self._counts())
        return "  ".join(parts)

    def _counts(self) -> str:
        """What the packs of an iteration held; last, as a terminal may cut it off."""
        counts = [f"{self.measured.get('supervised_tokens', 0):,.10g} supervised tokens"]
        media = (column for column in ("images", "videos", "patches") if self.measured.get(column))
        counts += [f"{self.measured[column]:,.10g} {column}" for column in media]
        return ", ".join([*counts, f"{self.measured.get('padding_share', 0):.1%} padding"])


def read_iteration(line: str) -> Iteration | None:
    """Parse the iteration in a line of Megatron's log, if any.

    Example: `read_iteration(" iteration  3/  400 | ... | lm loss: 2.5E+00 |").losses` is `{"lm loss": 2.5}`.
    """
    found = _ITERATION.search(line)
    if found is None:
        return None
    fields = dict(part.strip().rsplit(": ", 1) for part in found[3].split("|") if ": " in part)
    if "elapsed time per iteration (ms)" not in fields:
        return None
    names = list(fields)
    # Megatron writes the losses between these two fields, under the names from the loss function.
    losses = names[names.index("global batch size") + 1 : names.index("loss scale")]
    return Iteration(
        number=int(found[1]),
        last=int(found[2]),
        seconds=max(float(fields["elapsed time per iteration (ms)"]), 1e-6) / 1000,
        global_batch_size=int(fields["global batch size"]),
        losses={name: float(fields[name]) for name in losses},
        grad_norm=float(fields["grad norm"]) if "grad norm" in fields else None,
        loss_scale=float(fields["loss scale"]),
        skipped=int(fields["number of skipped iterations"]),
        nan=int(fields["number of nan iterations"]),
        learning_rate=float(fields["learning rate"]) if "learning rate" in fields else None,
        measured={column: float(fields[name]) for column, name in MEASURED.items() if name in fields},
    )


def read_event(line: str) -> str | None:
    """The line of the short log for another line of Megatron's log, or None.

    Example: `read_event(" validation loss at iteration 20 | lm loss value: 1.0E+00 | lm loss PPL: 2.7E+00 | ")` is
    `'validation loss 1.000000 at iteration 20'`.
    """
    if found := _VALIDATION.search(line):
        values = re.findall(r"\s*([^|]+?) value: (\S+) \|", found[3])
        losses = ", ".join(f"{name.removeprefix('lm ')} {_digits(float(value))}" for name, value in values)
        return f"validation{found[1]} {losses} at {found[2]}"
    if found := _SAVED.search(line):
        return f"checkpoint saved at iteration {found[1]}" + (f": {found[2]}" if found[2] else "")
    if found := _LOADED.search(line):
        return f"checkpoint loaded, iteration {found[2]}: {found[1]}"
    if _STOPPED.search(line):
        # Megatron names this signal whatever it was.
        return "stopped by a signal"
    if _IMPORTANT.search(line) and not _UNIMPORTANT.search(line):
        return line.strip()
    return None


def duration(seconds: float) -> str:
    """Format seconds.

    Example: `duration(7.25), duration(125), duration(3725)` is `('7.2 s', '2 min 5 s', '1 h 02 min')`.
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _digits(value: float) -> str:
    """All digits that Megatron logs (`{:.6E}`)."""
    return f"{value:#.7g}"
