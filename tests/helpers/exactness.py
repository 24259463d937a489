"""Answers of an engine held to an oracle, but for fp32 noise."""

import os
from collections.abc import Sequence
from typing import Protocol

import torch

from tests.helpers.engines import Answer
from tests.helpers.gpu.lines import record
from tests.helpers.tiny_models import PAGE_SIZE, WINDOW, OracleScores

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + PAGE_SIZE, 8 * WINDOW)


class Scorer(Protocol):
    """An oracle of next-token log-probabilities."""

    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        """Log-probabilities after each token, and the noise that an engine in fp32 may have.

        Args:
            prompt_len: how many of the tokens were the prompt, where a mask depends on it.
        """


def check_exact(prompts: list[list[int]], answers: list[Answer], oracle: Scorer) -> float:
    """The engine's tokens and log-probabilities are the oracle's but for fp32 noise.

    In a step of ``tests/gpu.sh`` the ratio of error to noise of every request is recorded.

    Returns:
        The largest error of a log-probability, in units of that noise.
    """
    scores = [oracle.score(p + a.tokens, len(p)) for p, a in zip(prompts, answers, strict=True)]
    noise = max(s.noise for s in scores)
    errors = []
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        expected = score.logprobs[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        got = torch.tensor(answer.logprobs, dtype=torch.float64)
        # The engine's token is the oracle's best, ties within noise aside.
        token_error = float((expected.max(dim=-1).values - chosen).max())
        logprob_error = float((got - chosen).abs().max())
        record(
            exactness=os.environ.get("PYTEST_CURRENT_TEST"),
            prompt_len=len(prompt),
            noise=noise,
            token_error_per_noise=token_error / noise,
            logprob_error_per_noise=logprob_error / noise,
        )
        errors.append((token_error, logprob_error))
    for token_error, logprob_error in errors:
        assert token_error <= noise, "a token is not the oracle's"
        assert logprob_error <= noise, "a log-probability is not the oracle's"
    return max(logprob_error for _, logprob_error in errors) / noise
