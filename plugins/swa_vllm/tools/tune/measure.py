"""Candidates measured on engines: their answers' losses and greedy tokens, and attention mass."""

import time
from collections.abc import Sequence
from typing import Any

from swa_backend.window import Phase
from swa_vllm.tools.common.progress import progress_bar, say
from swa_vllm.tools.engines.attention_mass import Text, measure_attention_mass
from swa_vllm.tools.engines.needles import Needle, recall
from swa_vllm.tools.engines.scoring import ScoringEngine
from swa_vllm.tools.engines.setup import Setup
from swa_vllm.tools.tune.candidates import FULL, Candidate, View
from swa_vllm.tools.tune.journal import Journal, Score
from swa_vllm.tools.tune.paired import Rise, rise_of_loss
from swa_vllm.tools.tune.requests import Request


class Measurements:
    """Scores of candidates, each measured once; a context manager that ends their engines.

    One engine runs at a time, until another candidate is measured.

    Attributes:
        start_s: seconds that an engine took to start, at most.
    """

    def __init__(self, setup: Setup, journal: Journal) -> None:
        self._setup, self._journal = setup, journal
        self.start_s = 0.0
        # By whether the answer is decoded.
        self._num_scored, self._scoring_s = {False: 0, True: 0}, {False: 0.0, True: 0.0}
        self._running: tuple[Candidate, ScoringEngine] | None = None

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running[1].__exit__()
            self._running = None

    def request_s(self, *, decodes: bool) -> float:
        """Give the seconds that a request took on average, its answer decoded or not."""
        return self._scoring_s[decodes] / max(1, self._num_scored[decodes])

    def scores(self, candidate: Candidate, requests: Sequence[Request]) -> list[Score]:
        """Score the answers of these requests."""
        missing = [r for r in requests if (candidate, r.line) not in self._journal]
        if missing:
            say(f"{candidate.text()}: {len(missing)} requests")
            for request in progress_bar(missing, "requests"):
                self._journal.add(candidate, request.line, self._score(candidate, request))
        return [self._journal[candidate, request.line] for request in requests]

    def time_decoding(self, request: Request) -> None:
        """Let full attention decode an answer, to know how long that takes."""
        say("an answer of full attention, decoded")
        self._score(FULL, request, decodes=True)

    def _score(
        self, candidate: Candidate, request: Request, *, decodes: bool | None = None
    ) -> Score:
        engine, started = self._engine_of(candidate), time.monotonic()
        if decodes is None:
            decodes = candidate.phase is not Phase.BOTH
        score = score_answer(engine, request, decodes=decodes)
        self._scoring_s[decodes] += time.monotonic() - started
        self._num_scored[decodes] += 1
        return score

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

    def mass(self, requests: Sequence[Request], views: Sequence[View]) -> dict[View, list[float]]:
        """Measure the attention mass of each layer that windows hide, from those who have them."""
        say(f"attention mass beyond windows: {len(requests)} requests")
        engine, masses = self._engine_of(FULL), dict[View, list[float]]()
        for phase in sorted({phase for _, _, phase in views}):
            texts = [_text_of(request, phase) for request in requests]
            windows = [(window, sinks) for window, sinks, other in views if other is phase]
            measured = measure_attention_mass(engine, texts, windows)
            masses |= {(*window, phase): mass for window, mass in measured.items()}
        return masses

    def _engine_of(self, candidate: Candidate) -> ScoringEngine:
        if self._running is None or self._running[0] != candidate:
            self.__exit__()
            begin = time.monotonic()
            self._running = candidate, ScoringEngine.start(self._setup, candidate.options())
            self.start_s = max(self.start_s, time.monotonic() - begin)
        return self._running[1]


def score_answer(engine: ScoringEngine, request: Request, *, decodes: bool = False) -> Score:
    """Score the answer of a request behind its prompt.

    Args:
        decodes: the answer is forced as generated tokens, which takes longer; otherwise both are
            served as one prompt, which is the same where no phase alone has a window.
    """
    length = len(request.answer)
    scored = engine.score(request.tokens, length if decodes else 0)
    loss = -sum(scored.logprobs[-length:])
    return Score(loss, tuple(scored.greedy[-length:]))


def _text_of(request: Request, phase: Phase) -> Text:
    num_prompt = len(request.prompt)
    if phase is Phase.PREFILL:
        return Text(request.prompt, first=0)
    pinned = num_prompt if phase is Phase.DECODE else 0
    return Text(request.tokens, first=num_prompt - 1, pinned=pinned)
