"""Answers of an engine held to an oracle, but for fp32 noise."""

from collections.abc import Sequence
from typing import Protocol

import torch

from tests.helpers.engines import Answer
from tests.helpers.tiny_models import PAGE_SIZE, WINDOW, OracleScores

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + PAGE_SIZE, 8 * WINDOW)


class Scorer(Protocol):
    """An oracle of next-token log-probabilities."""

    def score(self, tokens: Sequence[int]) -> OracleScores:
        """Log-probabilities after each token, and the noise that an engine in fp32 may have."""


def check_exact(prompts: list[list[int]], answers: list[Answer], oracle: Scorer) -> float:
    """The engine's tokens and log-probabilities are the oracle's but for fp32 noise.

    Returns:
        The largest error of a log-probability, in units of that noise.
    """
    scores = [oracle.score(p + a.tokens) for p, a in zip(prompts, answers, strict=True)]
    noise, largest = max(s.noise for s in scores), 0.0
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        expected = score.logprobs[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        # The engine's token is the oracle's best, ties within noise aside.
        behind = (expected.max(dim=-1).values - chosen).max()
        assert behind <= noise, "a token is not the oracle's"
        got = torch.tensor(answer.logprobs, dtype=torch.float64)
        error = (got - chosen).abs().max().item()
        assert error <= noise, "a log-probability is not the oracle's"
        largest = max(largest, error)
    return largest / noise
