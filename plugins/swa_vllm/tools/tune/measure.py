"""Candidates measured on engines: their answers' losses and greedy tokens, and attention mass."""

import time
from collections.abc import Sequence
from typing import Any

from swa_vllm.tools.common.progress import progress_bar, say
from swa_vllm.tools.engines.attention_mass import measure_attention_mass
from swa_vllm.tools.engines.needles import Needle, recall
from swa_vllm.tools.engines.scoring import ScoringEngine
from swa_vllm.tools.engines.setup import Setup
from swa_vllm.tools.tune.candidates import FULL, Candidate
from swa_vllm.tools.tune.journal import Journal, Score
from swa_vllm.tools.tune.paired import Rise, rise_of_loss
from swa_vllm.tools.tune.requests import Request


class Measurements:
    """Scores of candidates, each measured once; a context manager that ends their engines.

    One engine runs at a time, until another candidate is measured.

    Attributes:
        start_s: seconds that an engine took to start, at most.
        request_s: seconds that a request took, on average.
    """

    def __init__(self, setup: Setup, journal: Journal) -> None:
        self._setup, self._journal = setup, journal
        self.start_s = 0.0
        self._num_scored, self._scoring_s = 0, 0.0
        self._running: tuple[Candidate, ScoringEngine] | None = None

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running[1].__exit__()
            self._running = None

    @property
    def request_s(self) -> float:
        return self._scoring_s / max(1, self._num_scored)

    def scores(self, candidate: Candidate, requests: Sequence[Request]) -> list[Score]:
        """Score the answers of these requests."""
        missing = [r for r in requests if (candidate, r.line) not in self._journal]
        if missing:
            say(f"{candidate.text()}: {len(missing)} requests")
            engine, started = self._engine_of(candidate), time.monotonic()
            for request in progress_bar(missing, "requests"):
                self._journal.add(candidate, request.line, score_answer(engine, request))
            self._scoring_s += time.monotonic() - started
            self._num_scored += len(missing)
        return [self._journal[candidate, request.line] for request in requests]

    def rise(self, candidate: Candidate, requests: Sequence[Request]) -> Rise:
        """Compare a candidate with full attention on the same requests."""
        ours, full = self.scores(candidate, requests), self.scores(FULL, requests)
        num_tokens = [len(request.answer) for request in requests]
        return rise_of_loss([s.loss for s in ours], [s.loss for s in full], num_tokens)

    def agreement(self, candidate: Candidate, requests: Sequence[Request]) -> float:
        """Compute the part of answers' tokens at which both like the same token best."""
        pairs = [
            pair
            for ours, full in zip(
                self.scores(candidate, requests), self.scores(FULL, requests), strict=True
            )
            for pair in zip(ours.greedy, full.greedy, strict=True)
        ]
        return sum(ours == full for ours, full in pairs) / len(pairs)

    def recalled(self, candidate: Candidate, needles: Sequence[Needle], tokenizer: Any) -> int:
        """Count the numbers that a candidate recalls, each mentioned once in a text."""
        if not needles:
            return 0
        say(f"{candidate.text()}: recall of {len(needles)} numbers")
        llm = self._engine_of(candidate).llm
        assert llm is not None
        return sum(recall(llm, tokenizer, needles))

    def mass(
        self, requests: Sequence[Request], windows: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], list[float]]:
        """Measure the attention mass of each layer that windows hide from answers."""
        say(f"attention mass beyond windows: {len(requests)} requests")
        texts = [(request.tokens, len(request.prompt) - 1) for request in requests]
        return measure_attention_mass(self._engine_of(FULL), texts, windows)

    def _engine_of(self, candidate: Candidate) -> ScoringEngine:
        if self._running is None or self._running[0] != candidate:
            self.__exit__()
            begin = time.monotonic()
            self._running = candidate, ScoringEngine.start(self._setup, candidate.options())
            self.start_s = max(self.start_s, time.monotonic() - begin)
        return self._running[1]


def score_answer(engine: ScoringEngine, request: Request) -> Score:
    """Score the answer of a request behind its prompt, both served as one prompt."""
    scored, length = engine.score(request.tokens), len(request.answer)
    loss = -sum(scored.logprobs[-length:])
    return Score(loss, tuple(scored.greedy[-length:]))
