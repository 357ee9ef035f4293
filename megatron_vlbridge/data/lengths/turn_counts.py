"""How many assistant turns are learned, and why the others are not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TurnCounts:
    """Of the `assistant` turns of conversations, `excluded` are those that the chat template changes.

    `skipped` are those not to be learned (see `labels.options.skipped_turns`). `first_excluded` is the place of the
    first excluded turn and the reason.

    Example: `TurnCounts(assistant=5, skipped=2).reports[0]` starts with "2 of 5 assistant turns are not learned".
    """

    assistant: int = 0
    excluded: int = 0
    skipped: int = 0
    first_excluded: str = ""

    @property
    def reports(self) -> list[str]:
        """A sentence on the excluded turns, and one on the skipped ones, if there are any."""
        found = []
        if self.excluded:
            found.append(
                f"{self.excluded} of {self.assistant} assistant turns are excluded from the loss, as their tokens "
                f"differ from the message (first: {self.first_excluded})"
            )
        if self.skipped:
            found.append(
                f"{self.skipped} of {self.assistant} assistant turns are not learned, as they have "
                '"train": false or the weight 0, or --label-turns is last'
            )
        return found
