"""A median and its range: the one record and the one text for what was measured several times."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median, and the range that it stands for: of all values, or of their middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of_all(cls, values: Sequence[float]) -> "Spread":
        """Take the least and the most of a few values, such as one a round."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_middle_half(cls, values: Sequence[float]) -> "Spread":
        """Take the quartiles of many values, two at least, so that outliers do not count."""
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high)

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))

    def text(self, unit: float = 1.0) -> str:
        """Format the median and, in brackets, its range, each multiplied by ``unit``."""
        return f"{unit * self.median:.2f} ({self.range_text(unit)})"

    def range_text(self, unit: float = 1.0, digits: int = 2) -> str:
        """Format the range alone."""
        return f"{unit * self.low:.{digits}f} - {unit * self.high:.{digits}f}"
