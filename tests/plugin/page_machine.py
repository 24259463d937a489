"""A small engine without a model: vLLM's real KV cache manager and ours, over pages of tags.

The machine schedules, executes and settles steps the way vLLM does, with several in flight. A tag
names a token and all that came before it, so a page holds the right content iff it holds the right
tags. Whatever a query would see is looked up through the worker's append-only row of page ids; free
pages hold nothing.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from swa_backend.options import PrefillPages
from swa_backend.window import first_visible
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.page_checks import check_counts, check_held, check_nothing_held

MAX_MODEL_LEN = 400


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


@dataclass
class Sequence:
    """A request: its whole text, what has been computed for good, and its worker's rows.

    At ``rest_at`` it is the user's turn: the request waits with its pages, as a session does.
    """

    request: Request
    text: list[int]
    tags: list[int]
    rest_at: int | None = None
    settled: int = 0
    rows: list[list[int]] = field(default_factory=list)
    is_done: bool = False


@dataclass(frozen=True)
class Scheduled:
    """One request's share of a step; ``rows`` tells whether it was preempted since."""

    sequence: Sequence
    rows: list[list[int]]
    start: int
    num_tokens: int
    num_drafts: int


class PageMachine:
    """See the module."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        init_none_hash(sha256)
        common: dict[str, Any] = {
            "block_size": setup.page_size,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        sliding = SWASpec(
            **common,
            sliding_window=setup.window,
            storage=StoragePolicy(setup.sink_tokens, setup.spare_tokens, setup.prefill_pages),
            num_steps_in_flight=setup.num_steps_in_flight,
            rollback_tokens=setup.num_steps_in_flight * setup.num_drafts,
            lookahead_tokens=setup.num_lookahead,
            drops_last_hit=setup.drops_last_hit,
        )
        specs = [sliding if k == "sliding" else FullAttentionSpec(**common) for k in setup.kinds]
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
        )
        self.managers: list[Any] = list(self.kv.coordinator.single_type_managers)
        self.pool = self.kv.block_pool
        self.num_free_at_start = self.pool.get_num_free_blocks()
        self.hasher = get_request_block_hasher(setup.page_size, sha256)
        self.content: list[dict[int, dict[int, int]]] = [{} for _ in specs]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: deque[list[Scheduled]] = deque()
        self.num_made = self.num_hits = self.num_preempted = self.num_rejected = self.num_rests = 0
        self.num_steps = 0

    # --- what may happen -------------------------------------------------------------------------

    def add(self, text: list[int], num_prompt: int, rest_at: int | None = None) -> None:
        self.num_made += 1
        request = Request(
            request_id=str(self.num_made),
            prompt_token_ids=text[:num_prompt],
            sampling_params=SamplingParams(max_tokens=len(text) - num_prompt),
            pooling_params=None,
            block_hasher=self.hasher if self.setup.caching else None,
            resumable=rest_at is not None,
        )
        tags = list(accumulate(text, lambda tag, token: hash((tag, token)), initial=0))[1:]
        self.waiting.append(Sequence(request, text, tags, rest_at))

    def schedule(self, chunk: int) -> None:
        """Schedule a step in which no request gets more than ``chunk`` tokens."""
        if len(self.in_flight) == self.setup.num_steps_in_flight:
            self.settle(0)
        step: list[Scheduled] = []
        budget = self.setup.max_step_tokens
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
        while self.waiting and budget and len(self.running) < 8:
            share_or_none = self._admit(self.waiting[0], min(chunk, budget))
            if share_or_none is None:
                break
            self.running.append(self.waiting.popleft())
            step.append(share_or_none)
            budget -= share_or_none.num_tokens
        for share in step:
            share.sequence.request.num_computed_tokens += share.num_tokens
            share.sequence.request.num_in_flight_tokens += share.num_tokens
        for share in step:
            self._check_pages(share)
        self.check_counts()
        if step:
            self.num_steps += 1
            self.in_flight.append(step)

    def settle(self, rejects: int) -> None:
        """Execute the oldest step in flight and take its results; drafts may be rejected."""
        if not self.in_flight:
            return
        step = self.in_flight.popleft()
        self._clear_free_pages()
        for share in step:
            self._write(share)
        for share in step:
            sequence = share.sequence
            sequence.request.num_in_flight_tokens -= share.num_tokens
            if share.rows is sequence.rows and not sequence.is_done:
                self._check_reads(share)
                self._take_result(share, min(rejects, share.num_drafts))

    def abort(self, index: int) -> None:
        candidates = [*self.running, *self.waiting]
        if candidates:
            sequence = candidates[index % len(candidates)]
            self._end(sequence)

    def drain(self) -> None:
        """Let all requests get done, which a pool for one of the longest must do."""
        for _ in range(8 * MAX_MODEL_LEN):
            if not self.running and not self.waiting:
                return
            self.schedule(300)
            self.settle(0)
        raise AssertionError("stuck")

    def finish(self) -> None:
        """End everything and check that every page came back."""
        while self.in_flight:
            self.settle(0)
        while self.running or self.waiting:
            self.abort(0)
        assert self.pool.get_num_free_blocks() == self.num_free_at_start
        check_nothing_held(self.pool, self.managers)

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
        return Scheduled(sequence, sequence.rows, start, num_tokens, num_drafts)

    def _allocate(self, sequence: Sequence, share: Scheduled) -> bool:
        while True:
            new = self.kv.allocate_slots(
                sequence.request,
                share.num_tokens,
                num_lookahead_tokens=self.setup.num_lookahead,
            )
            if new is not None:
                for row, ids in zip(sequence.rows, new.get_block_ids(), strict=True):
                    row.extend(ids)
                return True
            victim = self.running.pop()
            self.num_preempted += 1
            self.kv.free(victim.request)
            victim.request.num_computed_tokens = 0
            victim.request.status = RequestStatus.PREEMPTED
            victim.settled, victim.rows = 0, []
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False

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
            full_sequence_must_fit=True,
            has_scheduled_reqs=bool(self.running),
        )
        if new is None:
            return None
        request.status = RequestStatus.RUNNING
        if rests:
            for row, ids in zip(sequence.rows, new.get_block_ids(), strict=True):
                row.extend(ids)
        else:
            self.num_hits += num_hit > 0
            request.num_computed_tokens = sequence.settled = num_hit
            sequence.rows = [list(ids) for ids in self.kv.get_block_ids(request.request_id)]
        return Scheduled(sequence, sequence.rows, start, num_tokens, 0)

    def _check_pages(self, share: Scheduled) -> None:
        """The table is the worker's row; it holds no dead page and no more than was promised."""
        request = share.sequence.request
        settled = request.num_computed_tokens - request.num_in_flight_tokens
        for manager, row in zip(self.managers, share.rows, strict=True):
            blocks = manager.req_to_blocks[request.request_id]
            assert len(blocks) == len(row)
            held = [i for i, block in enumerate(blocks) if not block.is_null]
            assert [row[i] for i in held] == [blocks[i].block_id for i in held]
            if not isinstance(manager, SWAManager):
                assert len(held) == len(blocks)
                continue
            check_held(manager, request.request_id, settled)

    def check_counts(self) -> None:
        """What a manager counts as held now is what its tables hold."""
        for manager in self.managers:
            if isinstance(manager, SWAManager):
                check_counts(manager)

    # --- the worker's side -----------------------------------------------------------------------

    def _clear_free_pages(self) -> None:
        for block in self.pool.blocks:
            if block.ref_cnt == 0 and block.block_hash is None:
                for content in self.content:
                    content.pop(block.block_id, None)

    def _write(self, share: Scheduled) -> None:
        sequence = share.sequence
        is_current = share.rows is sequence.rows and not sequence.is_done
        start = sequence.settled if is_current else share.start
        for content, row in zip(self.content, share.rows, strict=True):
            for position in range(start, min(start + share.num_tokens, len(sequence.text))):
                page, slot = divmod(position, self.setup.page_size)
                if row[page]:
                    tags = content.setdefault(row[page], {})
                    tags[slot] = sequence.tags[position]
        self._write_spare(share, start)

    def _write_spare(self, share: Scheduled, start: int) -> None:
        """Windowed layers may write anything behind the step's newest token."""
        end = min(start + share.num_tokens, len(share.sequence.text))
        for kind, content, row in zip(self.setup.kinds, self.content, share.rows, strict=True):
            if kind == "sliding":
                for position in range(end, end + self.setup.spare_tokens):
                    page, slot = divmod(position, self.setup.page_size)
                    assert any(row[page : page + 1]), "no page for a spare slot"
                    content.setdefault(row[page], {})[slot] = -1

    def _check_reads(self, share: Scheduled) -> None:
        """Every key before the chunk that its first query sees is where its row says."""
        sequence = share.sequence
        start = sequence.settled
        for kind, content, row in zip(self.setup.kinds, self.content, share.rows, strict=True):
            first = first_visible(start, self.setup.window if kind == "sliding" else None)
            sinks = self.setup.sink_tokens if kind == "sliding" else 0
            for position in (*range(min(sinks, first)), *range(first, start)):
                page, slot = divmod(position, self.setup.page_size)
                assert row[page], f"page {page} of {kind} layer is a hole but visible from {start}"
                assert content.get(row[page], {}).get(slot) == sequence.tags[position]

    def _take_result(self, share: Scheduled, num_rejected: int) -> None:
        sequence, request = share.sequence, share.sequence.request
        self.num_rejected += num_rejected
        request.num_computed_tokens -= num_rejected
        sequence.settled += share.num_tokens - num_rejected
        outputs = sequence.text[request.num_tokens : sequence.settled + 1]
        if outputs:
            request.append_output_token_ids(outputs)
        if sequence.settled >= len(sequence.text):
            self._end(sequence)
        elif sequence.rest_at is not None and sequence.settled >= sequence.rest_at:
            self._rest(sequence)

    def _rest(self, sequence: Sequence) -> None:
        """The answer is complete; once nothing is in flight the user goes on, before the others.

        vLLM admits requests that hold pages first.
        """
        if sequence.request.num_in_flight_tokens == 0:
            sequence.rest_at = None
            self.num_rests += 1
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.kv.free(sequence.request)
        sequence.is_done = True
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
