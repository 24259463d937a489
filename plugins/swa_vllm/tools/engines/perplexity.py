"""Perplexity of pieces of a text in an engine, and the pages that a request of one holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swa_vllm.tools.common.progress import progress_bar
from swa_vllm.tools.engines.scoring import ScoringEngine


@dataclass(frozen=True)
class Measured:
    """The perplexity of an engine, and what its longest request takes of the pool.

    Attributes:
        pages: that a decoding request holds behind a piece.
        peak_pages: the most that one held at once.
        pool_bytes: bytes of ``pages``.
        num_groups: KV groups of the engine.
    """

    perplexity: float
    pages: int
    peak_pages: int
    pool_bytes: int
    num_groups: int


def measure_perplexity(
    engine: ScoringEngine, pieces: Sequence[Sequence[int]], num_forced: int = 0
) -> Measured:
    """Score all pieces together, and note the pages of the request that held most.

    Args:
        num_forced: how many of a piece's last tokens are forced as generated ones; where it is not
            0, these alone are scored.
    """
    logprobs, held, peaks = list[float](), [], []
    for piece in progress_bar(pieces, "pieces"):
        scored = engine.score(piece, num_forced)
        logprobs += scored.logprobs[-num_forced:]  # [-0:] is all
        held.append(scored.pages[-1])
        peaks.append(max(scored.pages))
    return Measured(
        perplexity(logprobs),
        max(held),
        max(peaks),
        max(held) * engine.bytes_per_page,
        engine.num_groups,
    )


def perplexity(logprobs: Sequence[float]) -> float:
    """Perplexity of tokens that a model gives these log-probabilities, in nats."""
    return math.exp(-math.fsum(logprobs) / len(logprobs))
