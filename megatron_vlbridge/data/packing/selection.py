"""Which conversations fit into packs, and reports of those that are left out, cut, or not learned."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_vlbridge.data.lengths.measure import Measure, location
from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.packing.replacement import check_share
from megatron_vlbridge.data.packing.truncation import truncate
from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True)
class PackLimits:
    """A pack has `seq_length` tokens and at most `max_patches`; a conversation takes a multiple of `multiple_of`."""

    seq_length: int
    multiple_of: int = 1
    max_patches: int | None = None

    def exceeded(self, rows: Any) -> Any:
        """Which rows of a table of lengths, or whether a single one, exceed a limit."""
        exceeded = self._padded(rows["tokens"]) > self.seq_length
        return exceeded if self.max_patches is None else exceeded | (rows["patches"] > self.max_patches)

    def excess(self, row: Any) -> str:
        """The limit that a row exceeds."""
        if self._padded(row["tokens"]) > self.seq_length:
            return f"{row['tokens']} tokens do not fit into a pack of {self.seq_length}"
        return f"{row['patches']} patches do not fit into a pack of {self.max_patches}"

    def _padded(self, tokens: Any) -> Any:
        return -(-tokens // self.multiple_of) * self.multiple_of


class Selection:
    """The `conversations` of a dataset, their `rows` of lengths, and the indices of those that are `kept` for packs.

    `table` are their lengths. What exceeds the `limits` is an error, in `dropped`, or cut: with `too_long` "truncate"
    `truncated` has the number of messages that are left of each. `failed` have the indices of those that could not be
    measured, at most the share `max_bad_samples`; `turns` counts those of the kept conversations.

    Raises VLBridgeError: too many failed, one is too long, or none is left; the error names the first.

    Example: `Selection(conversations, table, measure, PackLimits(4096), "drop", 0).kept`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        table: LengthTable,
        measure: Measure,
        limits: PackLimits,
        too_long: str,
        max_bad_samples: float,
    ) -> None:
        check_share(max_bad_samples)
        self.limits = limits
        self.truncated: dict[int, int] = {}
        if too_long == "truncate":
            indices = limits.exceeded(table.rows).nonzero()[0].tolist()
            cut = truncate(conversations, table, measure, indices, lambda row: not limits.exceeded(row))
            conversations, table, self.truncated = cut.conversations, cut.table, cut.kept
        self.conversations, self.rows = conversations, table.rows
        self._first_failed = table.first_failed.text if table.first_failed else ""
        self.failed = self._find_failed(table, max_bad_samples)
        self.dropped = self._find_too_long(too_long)
        self.kept = np.setdiff1d(np.arange(len(conversations)), [*self.failed, *self.dropped])
        if not len(self.kept):
            reports = "; ".join(filter(None, (self.dropped_report, self.failed_report)))
            raise VLBridgeError(f"conversations: expected at least one that fits into a pack; {reports}")
        self.kept_rows = self.rows[self.kept]
        self.turns = table.count_turns(self.kept_rows)

    @property
    def reports(self) -> list[str]:
        """All reports that are not empty."""
        left_out = self.truncated_report, self.dropped_report, self.failed_report
        return [*self.turns.reports, *filter(None, left_out)]

    def as_json(self) -> dict[str, Any]:
        """How many conversations are left out or cut, the counts of turns, and the reports."""
        left_out = {name: len(getattr(self, name)) for name in ("failed", "dropped", "truncated")}
        return {**left_out, "turns": asdict(self.turns), "reports": self.reports}

    @property
    def truncated_report(self) -> str:
        """The number of conversations that were truncated, and the first of them; empty if there are none."""
        if not self.truncated:
            return ""
        index = min(self.truncated)
        first = f"{location(self.conversations[index], index)}: {self.truncated[index]} messages are left"
        return f"{len(self.truncated)} of {len(self.rows)} conversations are truncated (first: {first})"

    @property
    def dropped_report(self) -> str:
        """The number of conversations that were dropped, and the first of them; empty if there are none."""
        if not self.dropped:
            return ""
        first = self._excess(self.dropped[0])
        return f"{len(self.dropped)} of {len(self.rows)} conversations are dropped (first: {first})"

    @property
    def failed_report(self) -> str:
        """The number of conversations that cannot be measured, and the first of them; empty if there are none."""
        if not self.failed:
            return ""
        return f"{len(self.failed)} of {len(self.rows)} conversations cannot be encoded (first: {self._first_failed})"

    def _find_failed(self, table: LengthTable, share: float) -> list[int]:
        found: list[int] = table.failed.nonzero()[0].tolist()
        if found and not share:
            raise VLBridgeError(self._first_failed)
        if len(found) > share * len(self.rows):
            raise VLBridgeError(
                f"{len(found)} of {len(self.rows)} conversations cannot be encoded, more than --max-bad-samples "
                f"{share}; the first: {self._first_failed}"
            )
        return found

    def _find_too_long(self, too_long: str) -> list[int]:
        found: list[int] = self.limits.exceeded(self.rows).nonzero()[0].tolist()
        if found and too_long == "error":
            raise VLBridgeError(
                f"{self._excess(found[0])}; increase the limit, shorten the conversation, scale its images down, or "
                "drop or truncate it (--long-conversations drop or truncate)"
            )
        return found

    def _excess(self, index: int) -> str:
        """The limit that a conversation alone exceeds, and where it is."""
        return f"{location(self.conversations[index], index)}: {self.limits.excess(self.rows[index])}"
