"""A small engine without a model: vLLM's real KV cache manager and ours, over pages of tags.

The machine schedules, executes and settles steps the way vLLM does, with several in flight. A tag
names a token and all that came before it, so a page holds the right content iff it holds the right
tags. Whatever a query would see is looked up through the worker's append-only row of page ids, when
its step runs. What is free once a step is scheduled holds nothing when the step runs, as the worker
has run all earlier ones by then. With drafts or transfers, what is free when it runs holds nothing.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from swa_backend.options import PrefillPages
from swa_backend.pages import ceil_div
from swa_backend.window import Phase, first_visible, num_pinned
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.page_checks import (
    check_counts,
    check_counts_of_answers,
    check_held,
    check_held_by_answer,
    check_nothing_held,
)

MAX_MODEL_LEN = 400
# What PageMachine.happened counts, by the rule or the part of the manager that it needs.
EVENTS = (
    "steps",
    "requests",
    "sessions",
    "turns of a session",
    "turns that end with a step in flight",
    "aborts of running requests",
    "aborts of waiting requests",
    "aborts of sessions at rest",
    "aborts with a step in flight",
    "preemptions for want of pages",
    "preemptions with a step in flight",
    "rejected drafts",
    "admissions refused for want of pages",
    "prefix hits",
    "hits on pages in use",
    "hits across freed pages",
    "hits on freed pages that a step in flight reads",
    "pages freed that a step in flight reads",
    "hits with sinks below the window",
    "hits with sinks below the window that nobody held",
    "evictions",
    "resets of the prefix cache",
    "resets that a session at rest forbids",
    "skipped pages",
    "granted pages",
    "pages freed by a window",
    "tokens that skipped pages kept out of the prefix cache",
    "spare slots on a page of their own",
    "pages freed between a prompt and its window",
    "preemptions of answers whose prompts alone are cached",
    "loads",
    "loads behind a prefix hit",
    "loads that fail",
    "aborts of requests that load",
    "tables given to another server",
)


@dataclass(frozen=True)
class Setup:
    """What the machine is made of."""

    window: int = 10
    page_size: int = 4
    sink_tokens: int = 0
    spare_tokens: int = 0
    num_pages: int = 60
    kinds: tuple[str, ...] = ("full", "sliding")
    max_step_tokens: int = 48
    num_steps_in_flight: int = 1
    num_drafts: int = 0
    caching: bool = True
    prefill_pages: PrefillPages = PrefillPages.AUTO
    retention_interval: int | None = None
    num_lookahead: int = 0
    drops_last_hit: bool = False
    phase: Phase = Phase.BOTH
    transfers: bool = False
    must_fit: bool = True  # vLLM admits only whom it can serve to the end

    @property
    def frees_by_schedule(self) -> bool:
        """Whether windows free pages that steps in flight read."""
        return self.phase is Phase.BOTH and self.num_drafts == 0 and not self.transfers

    @property
    def rollback_tokens(self) -> int:
        """How far what is scheduled may be rolled back."""
        if self.frees_by_schedule:
            return self.num_steps_in_flight - 1
        return self.num_steps_in_flight * self.num_drafts


@dataclass
class Sequence:
    """A request: its whole text, what has been computed for good, and its worker's rows.

    At ``rest_at`` it is the user's turn: the request waits with its pages, as a session does, and
    the results of steps in flight are dropped. Of one that ``loads``, another server has computed
    the prompt; it waits for its pages to be filled.
    """

    request: Request
    text: list[int]
    tags: list[int]
    rest_at: int | None = None
    settled: int = 0
    rows: list[list[int]] = field(default_factory=list)
    num_turns: int = 0
    is_done: bool = False
    loads: bool = False
    is_loading: bool = False


@dataclass(frozen=True)
class Scheduled:
    """One request's share of a step; ``rows`` tells whether it was preempted since."""

    sequence: Sequence
    rows: list[list[int]]
    start: int
    num_tokens: int
    num_drafts: int
    turn: int

    @property
    def is_current(self) -> bool:
        """Whether the request still waits for the result."""
        is_held = self.rows is self.sequence.rows and not self.sequence.is_done
        return is_held and not self.is_of_past_turn

    @property
    def is_of_past_turn(self) -> bool:
        """Whether another text follows what was computed when the step was scheduled."""
        return self.turn < self.sequence.num_turns


@dataclass(frozen=True)
class Step:
    """What was scheduled together, and the pages that were free once it was."""

    shares: list[Scheduled]
    free_pages: set[int]


class _Evictions(KVCacheMetricsCollector):
    """Counts the cached pages that the pool takes for others."""

    def __init__(self, happened: Counter[str]) -> None:
        self._happened = happened

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        pass

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        pass

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        self._happened["evictions"] += 1

    def reset(self) -> None:
        pass


def _make_spec(setup: Setup, kind: str, common: dict[str, Any]) -> FullAttentionSpec | SWASpec:
    """Make the spec of a layer, full or sliding, as its class makes it."""
    if setup.phase is Phase.DECODE and kind == "sliding":
        return PromptWindowSpec(
            **common,
            window=setup.window,
            sink_tokens=setup.sink_tokens,
            spare_tokens=setup.spare_tokens,
            lookahead_tokens=setup.num_lookahead,
            max_in_flight_tokens=setup.num_steps_in_flight * setup.max_step_tokens,
        )
    if setup.phase is not Phase.BOTH:
        return PromptCacheSpec(**common)
    if kind == "full":
        return FullAttentionSpec(**common)
    return SWASpec(
        **common,
        sliding_window=setup.window,
        storage=StoragePolicy(setup.sink_tokens, setup.spare_tokens, setup.prefill_pages),
        num_steps_in_flight=setup.num_steps_in_flight,
        frees_by_schedule=setup.frees_by_schedule,
        rollback_tokens=setup.rollback_tokens,
        lookahead_tokens=setup.num_lookahead,
        drops_last_hit=setup.drops_last_hit,
        replayed_tokens=int(setup.transfers),
    )


class PageMachine:
    """See the module.

    Attributes:
        happened: how often, by the names of ``EVENTS``.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.happened = Counter[str]()
        init_none_hash(sha256)
        common: dict[str, Any] = {
            "block_size": setup.page_size,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        specs = [_make_spec(setup, kind, common) for kind in setup.kinds]
        self.kv = KVCacheManager(
            KVCacheConfig(
                num_blocks=setup.num_pages,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec([f"l{i}"], s) for i, s in enumerate(specs)],
                prefix_cache_retention_interval=setup.retention_interval,
            ),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=setup.page_size,
            hash_block_size=setup.page_size,
            max_in_flight_tokens=setup.num_steps_in_flight * setup.max_step_tokens,
            enable_caching=setup.caching,
            use_eagle=setup.drops_last_hit,
            metrics_collector=_Evictions(self.happened),
        )
        self.managers: list[Any] = list(self.kv.coordinator.single_type_managers)
        self.pool = self.kv.block_pool
        self.num_free_at_start = self.pool.get_num_free_blocks()
        self.hasher = get_request_block_hasher(setup.page_size, sha256)
        self.content: list[dict[int, dict[int, int]]] = [{} for _ in specs]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: deque[Step] = deque()
        self.num_run = 0  # steps in flight that the worker has run already

    # --- what may happen -------------------------------------------------------------------------

    def add(
        self, text: list[int], num_prompt: int, rest_at: int | None = None, *, loads: bool = False
    ) -> None:
        self.happened["requests"] += 1
        self.happened["sessions"] += rest_at is not None
        request = Request(
            request_id=str(self.happened["requests"]),
            prompt_token_ids=text[:num_prompt],
            sampling_params=SamplingParams(max_tokens=len(text) - num_prompt),
            pooling_params=None,
            block_hasher=self.hasher if self.setup.caching else None,
            resumable=rest_at is not None,
        )
        # With a window in one phase an answer's keys differ from those of a prompt of its text.
        ends = 0 if self.setup.phase is Phase.BOTH else num_prompt
        kinds = [(token, 0 < ends <= position) for position, token in enumerate(text)]
        tags = list(accumulate(kinds, lambda tag, token: hash((tag, token)), initial=0))[1:]
        self.waiting.append(Sequence(request, text, tags, rest_at, loads=loads))

    def schedule(self, chunk: int) -> None:
        """Schedule a step in which no request gets more than ``chunk`` tokens."""
        if len(self.in_flight) == self.setup.num_steps_in_flight:
            self.settle(0)
        step: list[Scheduled] = []
        held_before = self._held_by_windows()
        budget = self.setup.max_step_tokens
        num_preemptions = self.happened["preemptions for want of pages"]
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            share = self._share(sequence, min(chunk, budget))
            if share.num_tokens == 0:
                continue
            if not self._allocate(sequence, share):
                break  # itself preempted
            step.append(share)
            budget -= share.num_tokens
        loading = deque[Sequence]()
        has_pages = self.happened["preemptions for want of pages"] == num_preemptions
        while has_pages and self.waiting and budget and len(self.running) < 8:
            if self.waiting[0].loads and not self._begin_load(self.waiting[0]):
                break
            if self.waiting[0].is_loading:
                loading.append(self.waiting.popleft())
                continue
            share_or_none = self._admit(self.waiting[0], min(chunk, budget))
            if share_or_none is None:
                break
            self.running.append(self.waiting.popleft())
            step.append(share_or_none)
            budget -= share_or_none.num_tokens
        self.waiting.extendleft(reversed(loading))
        for share in step:
            share.sequence.request.num_computed_tokens += share.num_tokens
            share.sequence.request.num_in_flight_tokens += share.num_tokens
        for share in step:
            self._check_pages(share)
        self.check_counts()
        if step:
            self.happened["steps"] += 1
            freed = held_before - self._held_by_windows()
            self.happened["pages freed that a step in flight reads"] += len(
                freed & self._read_in_flight()
            )
            self.in_flight.append(Step(step, self._free_pages()))

    def settle(self, rejects: int) -> None:
        """Execute the oldest step in flight and take its results; drafts may be rejected."""
        if not self.in_flight:
            return
        if not self.num_run:
            self._run_step()
        self.num_run -= 1
        step = self.in_flight.popleft()
        for share in step.shares:
            sequence, is_current = share.sequence, share.is_current
            sequence.request.num_in_flight_tokens -= share.num_tokens
            if is_current:
                self._take_result(share, min(rejects, share.num_drafts))

    def load(self, *, fails: bool) -> None:
        """Let another server fill the pages of all who wait for it, or find that it cannot."""
        for sequence in [s for s in self.waiting if s.is_loading]:
            sequence.is_loading = False
            request = sequence.request
            if fails:
                self.happened["loads that fail"] += 1
                self.kv.free(request)
                request.num_computed_tokens = 0
                continue
            self._clear(self._free_pages())
            num_loaded = request.num_computed_tokens
            sequence.rows = [list(row) for row in self.kv.get_block_ids(request.request_id)]
            for content, row in zip(self.content, sequence.rows, strict=True):
                for position in range(sequence.settled, num_loaded):
                    page, slot = divmod(position, self.setup.page_size)
                    if row[page]:
                        content.setdefault(row[page], {})[slot] = sequence.tags[position]
            self.kv.cache_blocks(request, num_loaded)
            # The last token of a prompt is computed again, for the first of the answer.
            request.num_computed_tokens = min(num_loaded, request.num_tokens - 1)
            sequence.settled = request.num_computed_tokens

    def abort(self, index: int) -> None:
        candidates = [*self.waiting, *self.running]  # a session at rest comes first
        if candidates:
            sequence = candidates[index % len(candidates)]
            is_running, is_in_flight = sequence in self.running, self._is_in_flight(sequence)
            rests = not is_running and bool(sequence.rows)
            self.happened["aborts of requests that load"] += sequence.is_loading
            self.happened["aborts of running requests"] += is_running
            self.happened["aborts of waiting requests"] += not is_running and not rests
            self.happened["aborts of sessions at rest"] += rests
            self.happened["aborts with a step in flight"] += is_in_flight
            self._end(sequence)

    def reset_prefix_cache(self) -> None:
        """Forget all cached pages, as after a change of weights; who runs is preempted for it."""
        while self.running:
            self._preempt()
        may_reset = not any(s.rows or s.is_loading for s in self.waiting)
        assert self.kv.reset_prefix_cache() is may_reset
        self.happened["resets of the prefix cache"] += may_reset
        self.happened["resets that a session at rest forbids"] += not may_reset

    def drain(self) -> None:
        """Let all requests get done, which a pool for one of the longest must do."""
        for _ in range(8 * MAX_MODEL_LEN):
            if not self.running and not self.waiting:
                return
            self.schedule(300)
            self.load(fails=False)
            self.settle(0)
        raise AssertionError("stuck")

    def finish(self) -> None:
        """End everything and check that every page came back."""
        while self.in_flight:
            self.settle(0)
        for sequence in [*self.running, *self.waiting]:
            self._end(sequence)
        assert self.pool.get_num_free_blocks() == self.num_free_at_start
        check_nothing_held(self.pool, self.managers)
        for manager in self.managers:
            if isinstance(manager, SWAManager):
                counts = manager.snapshot()
                self.happened["skipped pages"] += counts.skipped
                self.happened["pages freed by a window"] += counts.freed_by_window
                self.happened["tokens that skipped pages kept out of the prefix cache"] += (
                    counts.prefix_lost_tokens
                )
            elif isinstance(manager, PromptWindowManager):
                freed = manager.snapshot().freed_by_window
                self.happened["pages freed between a prompt and its window"] += freed

    # --- the scheduler's side --------------------------------------------------------------------

    def _share(self, sequence: Sequence, limit: int) -> Scheduled:
        request = sequence.request
        start = request.num_computed_tokens
        num_known = request.num_tokens - start
        num_drafts = 0
        if num_known <= 1:
            # Decoding: the last token, or with steps in flight one that is not known yet.
            num_known = 1 if num_known == 1 or self.setup.num_steps_in_flight > 1 else 0
            num_drafts = min(self.setup.num_drafts, limit - 1) if num_known else 0
        room = min(limit, len(sequence.text) - start)
        num_tokens = max(0, min(num_known + num_drafts, room))
        num_drafts = max(0, min(num_drafts, num_tokens - 1))
        return Scheduled(sequence, sequence.rows, start, num_tokens, num_drafts, sequence.num_turns)

    def _allocate(self, sequence: Sequence, share: Scheduled) -> bool:
        while True:
            new = self.kv.allocate_slots(
                sequence.request,
                share.num_tokens,
                num_lookahead_tokens=self.setup.num_lookahead,
            )
            if new is not None:
                self._extend(sequence, new.get_block_ids(), share.start + share.num_tokens)
                return True
            self.happened["preemptions for want of pages"] += 1
            if self._preempt() is sequence:
                return False

    def _preempt(self) -> Sequence:
        victim = self.running.pop()
        self.happened["preemptions with a step in flight"] += self._is_in_flight(victim)
        self.happened["preemptions of answers whose prompts alone are cached"] += (
            self.setup.phase is not Phase.BOTH and victim.request.num_output_tokens > 0
        )
        self._free(victim)
        victim.request.num_computed_tokens = 0
        victim.request.status = RequestStatus.PREEMPTED
        victim.settled, victim.rows = 0, []
        self.waiting.appendleft(victim)
        return victim

    def _is_in_flight(self, sequence: Sequence) -> bool:
        return sequence.request.num_in_flight_tokens > 0

    def _admit(self, sequence: Sequence, limit: int) -> Scheduled | None:
        request, rests = sequence.request, bool(sequence.rows)
        blocks, num_hit, junction = None, 0, 0
        if not rests:
            blocks, num_hit, junction = self.kv.get_computed_blocks(request)
            request.shared_prefix_boundary = junction
        start = request.num_computed_tokens + num_hit
        num_tokens = min(request.num_tokens - start, limit)
        new = self.kv.allocate_slots(
            request,
            num_tokens,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=blocks,
            num_lookahead_tokens=self.setup.num_lookahead,
            full_sequence_must_fit=self.setup.must_fit,
            has_scheduled_reqs=bool(self.running),
        )
        if new is None:
            self.happened["admissions refused for want of pages"] += 1
            return None
        request.status = RequestStatus.RUNNING
        if not rests:
            self._count_hit(request.request_id, num_hit)
            request.num_computed_tokens = sequence.settled = num_hit
            num_pages = num_hit // self.setup.page_size
            ids = self.kv.get_block_ids(request.request_id)
            sequence.rows = [list(row[:num_pages]) for row in ids]
        self._extend(sequence, new.get_block_ids(), start + num_tokens)
        return Scheduled(sequence, sequence.rows, start, num_tokens, 0, sequence.num_turns)

    def _begin_load(self, sequence: Sequence) -> bool:
        """Take pages for a prompt that another server has computed, but for what hits have."""
        request = sequence.request
        blocks, num_hit, request.shared_prefix_boundary = self.kv.get_computed_blocks(request)
        num_loaded = request.num_prompt_tokens - num_hit
        new = self.kv.allocate_slots(
            request,
            0,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=blocks,
            num_external_computed_tokens=num_loaded,
            delay_cache_blocks=True,
            full_sequence_must_fit=self.setup.must_fit,
            has_scheduled_reqs=bool(self.running),
        )
        if new is None:
            self.happened["admissions refused for want of pages"] += 1
            return False
        sequence.loads, sequence.is_loading = False, True
        sequence.settled = num_hit
        request.num_computed_tokens = request.num_prompt_tokens
        self._count_hit(request.request_id, num_hit)
        self.happened["loads"] += 1
        self.happened["loads behind a prefix hit"] += num_hit > 0
        for manager in self.managers:
            blocks_of = manager.req_to_blocks[request.request_id]
            assert len(blocks_of) == ceil_div(request.num_prompt_tokens, self.setup.page_size)
            if isinstance(manager, SWAManager):
                check_held(manager, request.request_id, request.num_prompt_tokens)
        return True

    def _extend(self, sequence: Sequence, new: tuple[list[int], ...], end: int) -> None:
        """Add new pages to the rows; ``end`` is the position behind the step's tokens."""
        for manager, row, ids in zip(self.managers, sequence.rows, new, strict=True):
            if isinstance(manager, SWAManager) and not manager._stores_all:
                holes = manager._pages.holes(len(row), end)
                granted = ids[holes.start - len(row) :][: len(holes)]
                self.happened["granted pages"] += sum(page > 0 for page in granted)
            row.extend(ids)

    def _count_hit(self, request_id: str, num_hit: int) -> None:
        self.happened["prefix hits"] += num_hit > 0
        num_pages = num_hit // self.setup.page_size
        for manager in self.managers:
            hit = manager.req_to_blocks[request_id][:num_pages]
            real = [block for block in hit if not block.is_null]
            self.happened["hits on pages in use"] += any(block.ref_cnt > 1 for block in real)
            if isinstance(manager, SWAManager):
                self.happened["hits across freed pages"] += len(real) < len(hit)
                freed = {block.block_id for block in real if block.ref_cnt == 1}
                self.happened["hits on freed pages that a step in flight reads"] += bool(
                    freed & self._read_in_flight()
                )
                below = manager._hit_sinks(hit, num_hit)
                self.happened["hits with sinks below the window"] += len(below) > 0
                self.happened["hits with sinks below the window that nobody held"] += any(
                    block.ref_cnt == 1 for block in below
                )

    def _check_pages(self, share: Scheduled) -> None:
        """The table is the worker's row; it holds no dead page and no more than was promised."""
        request = share.sequence.request
        settled = request.num_computed_tokens - request.num_in_flight_tokens
        for manager, row in zip(self.managers, share.rows, strict=True):
            blocks = manager.req_to_blocks[request.request_id]
            assert len(blocks) == len(row)
            held = [i for i, block in enumerate(blocks) if not block.is_null]
            assert [row[i] for i in held] == [blocks[i].block_id for i in held]
            if isinstance(manager, SWAManager):
                check_held(manager, request.request_id, settled, share.start)
            elif isinstance(manager, PromptWindowManager):
                check_held_by_answer(manager, request, settled)
            else:
                assert len(held) == len(blocks)

    def check_counts(self) -> None:
        """What a manager counts as held now is what its tables hold."""
        for manager in self.managers:
            if isinstance(manager, SWAManager):
                check_counts(manager)
            elif isinstance(manager, PromptWindowManager):
                check_counts_of_answers(manager, [s.request for s in self.running])

    # --- the worker's side -----------------------------------------------------------------------

    def _run_step(self) -> None:
        """Execute the oldest step in flight that has not run."""
        step = self.in_flight[self.num_run]
        self._clear(step.free_pages if self.setup.frees_by_schedule else self._free_pages())
        for share in step.shares:
            self._write(share)
        for share in step.shares:
            self._check_reads(share)
        self.num_run += 1

    def _free(self, sequence: Sequence) -> None:
        """Give back all that a request holds.

        Another server fills pages at any time, so with transfers vLLM waits for steps in flight.
        """
        while self.setup.transfers and self.num_run < len(self.in_flight):
            self._run_step()
        self.kv.free(sequence.request)

    def _free_pages(self) -> set[int]:
        """Pages that nobody holds and no prompt may hit."""
        return {b.block_id for b in self.pool.blocks if b.ref_cnt == 0 and b.block_hash is None}

    def _held_by_windows(self) -> set[int]:
        """Pages of the windows of requests that run."""
        return {
            block.block_id
            for manager in self.managers
            if isinstance(manager, SWAManager)
            for sequence in self.running
            for block in manager.req_to_blocks.get(sequence.request.request_id, ())
            if not block.is_null
        }

    def _read_in_flight(self) -> set[int]:
        """Pages of windows that steps in flight read and whose results someone waits for."""
        size, window = self.setup.page_size, self.setup.window
        return {
            page
            for step in self.in_flight
            for share in step.shares
            if share.is_current
            for manager, row in zip(self.managers, share.rows, strict=True)
            if isinstance(manager, SWAManager)
            for start in [share.start]
            for page in row[first_visible(start, window) // size : ceil_div(start, size)]
        }

    def _clear(self, pages: set[int]) -> None:
        for content in self.content:
            for page in pages & content.keys():
                del content[page]

    def _write(self, share: Scheduled) -> None:
        sequence = share.sequence
        start = self._first_query(share)
        for content, row in zip(self.content, share.rows, strict=True):
            for position in range(start, min(start + share.num_tokens, len(sequence.text))):
                page, slot = divmod(position, self.setup.page_size)
                if row[page]:
                    tags = content.setdefault(row[page], {})
                    tags[slot] = -1 if share.is_of_past_turn else sequence.tags[position]
        self._write_spare(share, start)

    def _write_spare(self, share: Scheduled, start: int) -> None:
        """Windowed layers may write anything behind the step's newest token."""
        end = min(start + share.num_tokens, len(share.sequence.text))
        for manager, content, row in zip(self.managers, self.content, share.rows, strict=True):
            if isinstance(manager, SWAManager | PromptWindowManager):
                for position in range(end, end + self.setup.spare_tokens):
                    page, slot = divmod(position, self.setup.page_size)
                    assert any(row[page : page + 1]), "no page for a spare slot"
                    self.happened["spare slots on a page of their own"] += slot == 0
                    content.setdefault(row[page], {})[slot] = -1

    def _first_query(self, share: Scheduled) -> int:
        """Where a step that runs now starts, which is earlier if drafts before it were rejected."""
        is_earlier = share.is_current and self.setup.num_drafts > 0
        return share.sequence.settled if is_earlier else share.start

    def _check_reads(self, share: Scheduled) -> None:
        """Every key before the chunk that its first query sees is where its row says.

        So it has to be where the request was preempted or aborted since: what the step writes may
        be in the prefix cache.
        """
        sequence = share.sequence
        if share.is_current or (self.setup.frees_by_schedule and not share.is_of_past_turn):
            self._check_visible(sequence, self._first_query(share), share.rows)

    def _check_visible(self, sequence: Sequence, start: int, rows: list[list[int]]) -> None:
        """What the query at ``start`` sees of the keys before it is where the rows say."""
        setup = self.setup
        mask = (setup.phase, sequence.request.num_prompt_tokens)
        for kind, content, row in zip(setup.kinds, self.content, rows, strict=True):
            # A chunk that crosses the end of the prompt has queries that see more than its first.
            is_whole = kind == "full" or setup.phase is Phase.PREFILL
            first = first_visible(start, None if is_whole else setup.window, *mask)
            pinned = num_pinned(setup.sink_tokens, *mask)
            for position in (*range(min(pinned, first)), *range(first, start)):
                page, slot = divmod(position, self.setup.page_size)
                assert row[page], f"page {page} of {kind} layer is a hole but visible from {start}"
                assert content.get(row[page], {}).get(slot) == sequence.tags[position]

    def _take_result(self, share: Scheduled, num_rejected: int) -> None:
        sequence, request = share.sequence, share.sequence.request
        self.happened["rejected drafts"] += num_rejected
        request.num_computed_tokens -= num_rejected
        sequence.settled += share.num_tokens - num_rejected
        outputs = sequence.text[request.num_tokens : sequence.settled + 1]
        if outputs:
            request.append_output_token_ids(outputs)
        if sequence.settled >= len(sequence.text):
            if self.setup.transfers:
                self._check_handover(sequence)
            self._end(sequence)
        elif sequence.rest_at is not None and sequence.settled >= sequence.rest_at:
            self._rest(sequence)

    def _check_handover(self, sequence: Sequence) -> None:
        """As vLLM does: who gets these pages may compute the last token again."""
        request = sequence.request
        num_settled = request.num_computed_tokens - request.num_in_flight_tokens
        self.kv.remove_skipped_blocks(
            request.request_id, num_settled, num_prompt_tokens=request.num_prompt_tokens
        )
        rows = self.kv.get_block_ids_for_computed_tokens(request.request_id, num_settled)
        self._check_visible(sequence, sequence.settled - 1, [list(row) for row in rows])
        self.happened["tables given to another server"] += 1

    def _rest(self, sequence: Sequence) -> None:
        """The answer is complete, and the user goes on before the others.

        vLLM drops what is in flight of the answer, and admits requests that hold pages first.
        """
        request = sequence.request
        request.num_computed_tokens = sequence.settled
        sequence.rest_at = None
        sequence.num_turns += 1
        self.happened["turns of a session"] += 1
        self.happened["turns that end with a step in flight"] += self._is_in_flight(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.is_done = True
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
