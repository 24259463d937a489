"""A model of vLLM's scheduler: the requests that run at once, by pages and token budgets.

All requests are alike and share nothing. vLLM 0.32 and 0.33, ``v1/core/sched/scheduler.py``: a step
first serves what runs, in order of arrival, and preempts the newest where pages are short; then it
admits what waits while tokens are left and the whole prompt's charge is free. No vLLM is imported;
``tests/tools/test_plan.py`` holds every step against vLLM's own scheduler.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from swa_backend.request_pages import RequestPages
from swa_vllm.tools.common.sizing import KVGroups, Limits


@dataclass(frozen=True)
class Workload:
    """Requests of one size.

    Attributes:
        num_requests: requests that are there at the start; None for as many as can run.
    """

    num_prompt: int
    num_output: int
    num_requests: int | None = None


@dataclass
class _Request:
    num_known: int  # tokens of prompt and answer, those that steps in flight will bring included
    num_answered: int = 0
    num_computed: int = 0
    in_flight: deque[int] = field(default_factory=deque)
    is_running: bool = False
    tables: list[RequestPages] = field(default_factory=list)


class Queue:
    """A scheduler whose requests are all alike, stepped by hand.

    Attributes:
        num_running: requests in each step so far.
        num_preemptions: requests that had to start over.
        num_finished: answers that are complete.
        first_finish: steps until the first was.
    """

    def __init__(
        self, groups: Sequence[KVGroups], num_pages: int, limits: Limits, workload: Workload
    ) -> None:
        self._groups, self._limits, self._workload = groups, limits, workload
        self._num_usable = self._num_free = num_pages - 1  # vLLM never gives out the first page
        self._running: list[_Request] = []
        self._preempted: deque[_Request] = deque()
        self._num_new = workload.num_requests
        self._steps: deque[list[_Request]] = deque()
        self.num_running: list[int] = []
        self.num_preemptions = self.num_finished = 0
        self.first_finish: int | None = None

    @property
    def num_held(self) -> int:
        """Number of pages that requests hold now."""
        return self._num_usable - self._num_free

    def step(self) -> bool:
        """Schedule a step and, where enough are in flight, settle the oldest; false at the end."""
        scheduled = self._schedule()
        if scheduled:
            self.num_running.append(len(scheduled))
            self._steps.append(scheduled)
            if len(self._steps) < self._limits.num_steps_in_flight:
                return True
        if not self._steps:
            return False
        self._settle(self._steps.popleft())
        return True

    def _schedule(self) -> list[_Request]:
        budget, num_preemptions = self._limits.max_num_batched_tokens, self.num_preemptions
        scheduled: list[_Request] = []
        index = 0
        while index < len(self._running) and budget > 0:
            request = self._running[index]
            index += 1
            if request.num_answered == self._workload.num_output:
                continue  # its last token is on the way
            num_tokens = min(request.num_known - request.num_computed, budget)
            if not self._take(request, num_tokens):
                break
            scheduled.append(request)
            self._advance(request, num_tokens)
            budget -= num_tokens
        if num_preemptions == self.num_preemptions:
            scheduled += self._admit(budget)
        return scheduled

    def _admit(self, budget: int) -> list[_Request]:
        admitted = []
        # A preempted request waits until its tokens on the way have come; others pass it.
        late = [request for request in self._preempted if request.in_flight]
        ready = deque(request for request in self._preempted if not request.in_flight)
        while budget > 0 and len(self._running) < self._limits.max_num_seqs:
            is_new = not ready
            if is_new and self._num_new == 0:
                break
            request = _Request(self._workload.num_prompt) if is_new else ready[0]
            charge = sum(g.num_groups * g.policy.charge(request.num_known) for g in self._groups)
            num_tokens = min(request.num_known, budget)
            request.tables = [RequestPages(group.policy) for group in self._groups]
            if charge > self._num_free or self._missing(request, num_tokens) > self._num_free:
                break
            if not is_new:
                ready.popleft()
            elif self._num_new is not None:
                self._num_new -= 1
            self._grow(request, num_tokens)
            request.is_running = True
            self._running.append(request)
            admitted.append(request)
            self._advance(request, num_tokens)
            budget -= num_tokens
        self._preempted = deque(late + list(ready))
        return admitted

    def _take(self, request: _Request, num_tokens: int) -> bool:
        """Take pages for a step of a running request; false if it had to be preempted itself."""
        num_settled = request.num_computed - sum(request.in_flight)
        for group, table in zip(self._groups, request.tables, strict=True):
            self._num_free += group.num_groups * table.settle(num_settled, request.num_computed)
        while self._missing(request, request.num_computed + num_tokens) > self._num_free:
            victim = self._running.pop()
            self._free(victim)
            victim.num_computed, victim.is_running = 0, False
            self._preempted.appendleft(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        self._grow(request, request.num_computed + num_tokens)
        return True

    def _missing(self, request: _Request, num_tokens: int) -> int:
        return sum(
            group.num_groups * table.missing(num_tokens)
            for group, table in zip(self._groups, request.tables, strict=True)
        )

    def _grow(self, request: _Request, num_tokens: int) -> None:
        for group, table in zip(self._groups, request.tables, strict=True):
            before = table.live
            table.take(num_tokens)
            self._num_free -= group.num_groups * (table.live - before)

    def _free(self, request: _Request) -> None:
        for group, table in zip(self._groups, request.tables, strict=True):
            self._num_free += group.num_groups * table.live
        request.tables = []

    def _advance(self, request: _Request, num_tokens: int) -> None:
        request.num_computed += num_tokens
        request.in_flight.append(num_tokens)
        if request.num_computed == request.num_known:
            request.num_known += 1
            request.num_answered += 1

    def _settle(self, scheduled: list[_Request]) -> None:
        finished = False
        for request in scheduled:
            request.in_flight.popleft()
            if request.num_answered < self._workload.num_output or request.in_flight:
                continue
            finished = True
            self.num_finished += 1
            if request.is_running:
                self._free(request)
            else:
                self._preempted.remove(request)
            request.is_running = False
        if finished:
            self._running = [request for request in self._running if request.is_running]
            if self.first_finish is None:
                self.first_finish = len(self.num_running)


def queue_pages_of_one_request(
    groups: Sequence[KVGroups], limits: Limits, workload: Workload
) -> tuple[int, int]:
    """Count the pages of one request alone: the most in its life, and those at its last step."""
    num_pages = 1 + sum(
        group.num_groups * group.policy.num_entries(workload.num_prompt + workload.num_output)
        for group in groups
    )
    queue = Queue(groups, num_pages, limits, replace(workload, num_requests=1))
    peak = last = 0
    while queue.step():
        if queue.num_held:
            last = queue.num_held
            peak = max(peak, last)
    return peak, last


def running_at_once(
    groups: Sequence[KVGroups], num_pages: int, limits: Limits, workload: Workload
) -> float:
    """Average the requests in a step while more wait than can run.

    Counted from the end of the first answer, over two answers' lengths.
    """
    queue = Queue(groups, num_pages, limits, workload)
    while queue.first_finish is None:
        if not queue.step():
            return 0.0  # the pool does not hold one
    while len(queue.num_running) < queue.first_finish + 2 * workload.num_output and queue.step():
        pass
    counted = queue.num_running[queue.first_finish :]
    return sum(counted) / len(counted) if counted else 0.0
