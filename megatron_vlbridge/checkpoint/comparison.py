"""What a comparison found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One tensor or file that is not the same, and how."""

    name: str
    text: str


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison of `a` with `b`: how much was compared, and every difference, the first one first."""

    a: str
    b: str
    compared: int
    nbytes: int
    differences: tuple[Difference, ...]
    unit: str = "tensors"

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not self.differences
