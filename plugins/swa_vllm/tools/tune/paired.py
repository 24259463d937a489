"""Statistics of two arms on the same requests: the rise of the loss, with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.95996


@dataclass(frozen=True)
class Rise:
    """How much the loss of answers rises, in nats a token: 0.02 is 2.0 % of perplexity.

    Attributes:
        mean: over all tokens of all requests.
        error: its standard error, by how requests differ.
        num_requests: those compared.
    """

    mean: float
    error: float
    num_requests: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - student_quantile(self.num_requests - 1) * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + student_quantile(self.num_requests - 1) * self.error

    def expected_high(self, num_others: int) -> float:
        """Where so many other requests of the same kind put the upper end, at most.

        It is the upper end of the interval for their mean: they vary as well.
        """
        wider = math.sqrt(1 + self.num_requests / num_others)
        return self.mean + student_quantile(self.num_requests - 1) * self.error * wider

    def to_json(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}

    def text(self) -> str:
        """Format it as growth of perplexity, in percent, with the interval."""
        mean, low, high = (100 * math.expm1(value) for value in (self.mean, self.low, self.high))
        return f"{mean:+.2f} % ({low:+.2f} to {high:+.2f})"


def rise_of_loss(
    losses: Sequence[float], full_losses: Sequence[float], num_tokens: Sequence[int]
) -> Rise:
    """Compare two arms on the same requests, two at least.

    The mean weighs tokens alike, so it is a ratio of sums, whose error is linearized (Cochran,
    Sampling Techniques, 6.3): requests differ in their length too.

    Args:
        losses: summed over the tokens of each answer, in nats.
    """
    rises = [ours - full for ours, full in zip(losses, full_losses, strict=True)]
    count, total = len(rises), sum(num_tokens)
    mean = math.fsum(rises) / total
    left = math.fsum((r - mean * n) ** 2 for r, n in zip(rises, num_tokens, strict=True))
    return Rise(mean, math.sqrt(left * count / (count - 1)) / total, count)


def student_quantile(degrees: int) -> float:
    """Quantile of Student's t for a two-sided interval of 95 %."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL  # Cornish-Fisher's expansion: within 1e-3 from here on
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
