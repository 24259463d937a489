"""Pages of vLLM's real KV cache manager and ours, by random walks of a small engine."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.request import Request

import swa_vllm
from swa_backend.options import PrefillPages
from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import Phase
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.prompt_cache import PromptCacheManager
from swa_vllm.kv_cache.prompt_window import PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec
from tests.plugin.page_machine import EVENTS, PageMachine, Setup

Record = Callable[[str, object], None]

STEPS = 50
NUM_WALKS = 1600
MAX_TEXT = 12 + 255
# Two texts that share a prefix, and one of its own.
_SHARED = [token % 251 for token in range(0, 2500, 7)]
TEXTS = [_SHARED, [*_SHARED[:75], *range(1000, 1250)], list(range(2000, 2300))]


def _setup(room: float, **kwargs: Any) -> Setup:
    """Of a pool that holds ``room`` times what the longest text may hold."""
    setup = Setup(**kwargs)
    longest = ceil_div(MAX_TEXT + setup.spare_tokens, setup.page_size)
    windowed = ceil_div(setup.window + setup.max_step_tokens, setup.page_size) + 4
    most = {"full": longest, "sliding": min(longest, windowed)}
    if setup.phase is not Phase.BOTH:
        most["sliding"] = longest  # as a prompt may be
    return replace(setup, num_pages=2 + int(room * sum(most[kind] for kind in setup.kinds)))


any_setups = st.builds(
    _setup,
    room=st.sampled_from([0.7, 1, 1, 1.5, 4]),
    window=st.sampled_from([1, 2, 5, 8, 9, 10, 17, 33]),
    page_size=st.sampled_from([2, 4, 8]),
    sink_tokens=st.sampled_from([0, 1, 4, 9]),
    spare_tokens=st.sampled_from([0, 0, 1, 9]),
    kinds=st.sampled_from(
        [("sliding",), ("full", "sliding"), ("sliding", "full"), ("full", "sliding", "sliding")]
    ),
    max_step_tokens=st.sampled_from([8, 48, 300]),
    num_steps_in_flight=st.sampled_from([1, 1, 2, 3]),
    num_drafts=st.sampled_from([0, 0, 1, 4]),
    caching=st.sampled_from([True, True, True, False]),
    prefill_pages=st.sampled_from(PrefillPages),
    retention_interval=st.sampled_from([None, 0]),
    num_lookahead=st.sampled_from([0, 3, 9]),
    drops_last_hit=st.booleans(),
)
# In these the sinks of a hit are often the last free pages, and whoever takes them must be charged.
short_setups = st.builds(
    _setup,
    room=st.sampled_from([0.5, 0.7, 1]),
    window=st.sampled_from([1, 5, 9, 17]),
    page_size=st.sampled_from([2, 4]),
    sink_tokens=st.just(9),
    kinds=st.sampled_from([("sliding",), ("full", "sliding")]),
    max_step_tokens=st.sampled_from([8, 48, 300]),
    num_lookahead=st.just(9),
)
# In these a prompt's chunks are in flight together, and others hit the pages that they have read.
chunked_setups = st.builds(
    _setup,
    room=st.sampled_from([1, 1.5, 4]),
    window=st.sampled_from([2, 5, 9, 17, 33]),
    page_size=st.sampled_from([2, 4]),
    sink_tokens=st.sampled_from([0, 0, 9]),
    kinds=st.sampled_from([("sliding",), ("full", "sliding")]),
    max_step_tokens=st.sampled_from([8, 16, 24]),
    num_steps_in_flight=st.sampled_from([2, 3]),
    caching=st.sampled_from([True, True, False]),
    prefill_pages=st.sampled_from(PrefillPages),
)
setups = st.sampled_from(
    [any_setups, any_setups, any_setups, chunked_setups, chunked_setups, short_setups]
).flatmap(lambda s: s)
# A window in one phase; EAGLE is refused with these, and no page of theirs is skipped.
phased_setups = st.builds(
    _setup,
    room=st.sampled_from([0.7, 1, 1, 1.5, 4]),
    window=st.sampled_from([1, 2, 5, 8, 17]),
    page_size=st.sampled_from([2, 4, 8]),
    sink_tokens=st.sampled_from([0, 9]),
    spare_tokens=st.sampled_from([0, 6]),
    kinds=st.sampled_from([("sliding",), ("full", "sliding"), ("sliding", "full")]),
    max_step_tokens=st.sampled_from([8, 48, 300]),
    num_steps_in_flight=st.sampled_from([1, 1, 2, 3]),
    num_drafts=st.sampled_from([0, 0, 4]),
    caching=st.sampled_from([True, True, True, False]),
    num_lookahead=st.sampled_from([0, 3]),
    phase=st.sampled_from([Phase.PREFILL, Phase.DECODE, Phase.DECODE]),
)
# Pages come from other servers and go to them; sinks and drafts are refused with these.
transferred_setups = st.builds(
    _setup,
    room=st.sampled_from([0.7, 1, 1, 1.5, 4]),
    window=st.sampled_from([1, 2, 5, 8, 9, 17, 33]),
    page_size=st.sampled_from([2, 4, 8]),
    kinds=st.sampled_from([("sliding",), ("full", "sliding"), ("sliding", "full")]),
    max_step_tokens=st.sampled_from([8, 48, 300]),
    num_steps_in_flight=st.sampled_from([1, 1, 2, 3]),
    caching=st.sampled_from([True, True, True, False]),
    prefill_pages=st.sampled_from(PrefillPages),
    retention_interval=st.sampled_from([None, 0]),
    transfers=st.just(True),
    must_fit=st.sampled_from([True, True, False]),
)


def walk(setup: Setup, choices: bytes, *, to_the_end: bool = False) -> PageMachine:
    """Let the machine do what ``choices``, three bytes an action, tell it to.

    To the end, every request gets done. There is no session then: vLLM takes no page away from one
    at rest, and several may hold each other up. Nor with a window in one phase: a session's turns
    would move the end of its prompt, which tests of that manager try.
    """
    machine = PageMachine(setup)
    rests = not to_the_end and setup.phase is Phase.BOTH and not setup.transfers
    for action, first, second in zip(choices[::3], choices[1::3], choices[2::3], strict=True):
        match action % 10:
            case 0 | 1 | 2:
                text = TEXTS[first % 3][: 12 + second]
                num_prompt = 1 + first * (len(text) - 2) // 255
                rest_at = num_prompt + 9 if rests and first % 5 == 0 else None
                machine.add(text, num_prompt, rest_at, loads=setup.transfers and second % 2 == 0)
            case 3 | 4 | 5 | 6:
                machine.schedule(1 + second if first % 2 else 300)
            case 7 | 8:
                machine.load(fails=second % 4 == 0)
                machine.settle(first % 5)
            case 9:
                if first % 3 == 0:
                    machine.abort(second if second % 2 else 0)
                elif first % 8 == 1:
                    machine.reset_prefix_cache()
                else:
                    machine.schedule(300)
    if to_the_end:
        machine.drain()
    machine.finish()
    return machine


@pytest.fixture(autouse=True)
def _registered() -> None:
    swa_vllm.register()


actions = st.binary(min_size=3 * STEPS, max_size=3 * STEPS)


def _check_walks(num_walks: int, record: Record) -> Counter[str]:
    """Check random walks, and a quarter as many each with a window in one phase and with transfers.

    Returns:
        In how many of them each event happened.
    """
    happened, seen_in = Counter[str](), Counter[str]()

    def check(setup: Setup, choices: bytes) -> None:
        events = walk(setup, choices).happened
        happened.update(walks=1, steps=events["steps"])
        seen_in.update(event for event in EVENTS if events[event])

    strategies = (
        (setups, num_walks),
        (phased_setups, num_walks // 4),
        (transferred_setups, num_walks // 4),
    )
    for strategy, num_examples in strategies:
        tries = settings(
            max_examples=num_examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        tries(given(strategy, actions)(check))()
    for name, number in happened.items():
        record(f"summary: state machine, {name}", number)
    for event in EVENTS:
        record(f"summary: state machine, walks with {event}", seen_in[event])
    return seen_in


def test_no_visible_page_is_lost_and_no_dead_one_kept(record_property: Record) -> None:
    seen_in = _check_walks(NUM_WALKS, record_property)
    assert all(seen_in[event] >= 5 for event in EVENTS), seen_in


@pytest.mark.full
def test_no_visible_page_is_lost_and_no_dead_one_kept_in_many_walks(
    record_property: Record,
) -> None:
    _check_walks(20_000, record_property)


# What must never be got wrong, each broken on purpose.
def _keep_one_page_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    first_survivor = WindowPages.first_survivor
    monkeypatch.setattr(WindowPages, "first_survivor", lambda s, n: first_survivor(s, n) + 1)


def _forget_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    first_survivor = WindowPages.first_survivor
    monkeypatch.setattr(
        WindowPages,
        "first_survivor",
        lambda s, n: first_survivor(replace(s, rollback_tokens=0), n),
    )


def _free_what_the_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is scheduled, the step that is being scheduled included."""
    allocate = SWAManager.allocate_new_blocks

    def allocate_and_free(self: Any, request_id: str, *args: int) -> list[KVCacheBlock]:
        new = allocate(self, request_id, *args)
        self.remove_skipped_blocks(request_id, 0)
        return list(new)

    monkeypatch.setattr(SWAManager, "allocate_new_blocks", allocate_and_free)


def _forget_that_turns_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session has scheduled is rolled back by the tokens that it drops."""
    remove = SWAManager.remove_skipped_blocks

    def remove_all(self: Any, request_id: str, num_settled: int, *args: Any) -> None:
        if (held := self._held.get(request_id)) is not None:
            num_settled = max(num_settled, held.num_scheduled)
        remove(self, request_id, num_settled, *args)

    monkeypatch.setattr(SWAManager, "remove_skipped_blocks", remove_all)


def _free_drafts_by_what_is_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_that_turns_end(monkeypatch)


def _write_before_earlier_steps_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker would that does not run its steps in order."""
    schedule = PageMachine.schedule

    def schedule_and_write(self: PageMachine, chunk: int) -> None:
        schedule(self, chunk)
        self._clear(self._free_pages())

    monkeypatch.setattr(PageMachine, "schedule", schedule_and_write)


def _free_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = SWAManager.get_num_skipped_tokens
    monkeypatch.setattr(SWAManager, "get_num_skipped_tokens", lambda s, n: skipped(s, n + 1))


def _stop_freeing_at_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SWAManager, "_remove_blocks_in_range", SlidingWindowManager._remove_blocks_in_range
    )


def _need_one_page_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = SWAManager.get_num_blocks_to_allocate
    monkeypatch.setattr(
        SWAManager,
        "get_num_blocks_to_allocate",
        lambda s, *args, **kwargs: max(0, needed(s, *args, **kwargs) - 1),
    )


def _promise_one_page_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    max_held = WindowPages.max_held
    monkeypatch.setattr(WindowPages, "max_held", lambda *args: max_held(*args) - 1)


def _grant_before_others_took_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = SWAManager.allocate_new_blocks

    def allocate_and_grant(self: Any, request_id: str, *args: int) -> list[KVCacheBlock]:
        new = list(allocate(self, request_id, *args))
        held, table = self._held[request_id], self.req_to_blocks[request_id]
        if new:
            spare = min(len(held.holes), self.block_pool.get_num_free_blocks())
            granted = self.block_pool.get_new_blocks(spare)
            new[:spare] = table[held.holes.start : held.holes.start + spare] = granted
            self._held.count_taken(held, spare)
            held.holes = range(0)
        return new

    monkeypatch.setattr(SWAManager, "allocate_new_blocks", allocate_and_grant)


def _free_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowPages, "num_sink_pages", property(lambda s: 0))


def _hit_without_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SWAManager, "find_longest_cache_hit", SlidingWindowManager.find_longest_cache_hit
    )


def _take_no_hold_of_hit_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SWAManager, "_hit_sinks", lambda *args: [])


def _forget_spare_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = SWAManager.allocate_new_blocks
    monkeypatch.setattr(
        SWAManager,
        "allocate_new_blocks",
        lambda s, r, n, main: allocate(s, r, n - s._spare_tokens, main),
    )


def _cache_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptCacheManager, "cache_blocks", FullAttentionManager.cache_blocks)


def _look_answers_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCacheManager.cache_blocks

    def cache_blocks(self: Any, request: Request, *args: Any, **kwargs: Any) -> None:
        cache(self, request, *args, **kwargs)
        request.skip_reading_prefix_cache = False

    monkeypatch.setattr(PromptCacheManager, "cache_blocks", cache_blocks)


def _free_the_end_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PromptWindowSpec.pages
    monkeypatch.setattr(PromptWindowSpec, "pages", lambda s, n: pages(s, max(1, n - s.block_size)))


def _free_windows_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = WindowPages.dead
    monkeypatch.setattr(WindowPages, "dead", lambda s, n: dead(s, n + 1))


def _recompute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SWASpec, "pages", property(lambda s: WindowPages(s.sliding_window, s.block_size))
    )


def _count_loads_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = SWAManager.get_num_blocks_to_allocate

    def needed_without_holes_of_loads(
        self: Any, request_id: str, num: int, hits: Any, *args: Any, **kw: Any
    ) -> int:
        blocks = needed(self, request_id, num, hits, *args, **kw)
        loads = request_id not in self._held and args[0] > len(hits) * self.block_size
        is_counted = loads and not kw.get("apply_admission_cap")
        return blocks - len(self._holes(len(hits), num)) * is_counted

    monkeypatch.setattr(SWAManager, "get_num_blocks_to_allocate", needed_without_holes_of_loads)


def _leave_loads_out_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SWAManager,
        "allocate_external_computed_blocks",
        SlidingWindowManager.allocate_external_computed_blocks,
    )


TRANSFERS = Setup(prefill_pages=PrefillPages.SURVIVORS, num_pages=70, transfers=True)
SINKS = Setup(sink_tokens=5, spare_tokens=5, num_pages=80)


@pytest.mark.parametrize(
    ("break_it", "setup"),
    [
        (_free_sinks, SINKS),
        (_hit_without_sinks, SINKS),
        (_take_no_hold_of_hit_sinks, SINKS),
        (_forget_spare_slots, SINKS),
        (_keep_one_page_fewer, Setup()),
        (_forget_rollback, Setup(2, 2, num_drafts=4, prefill_pages=PrefillPages.SURVIVORS)),
        (_free_what_the_step_reads, Setup(num_steps_in_flight=2)),
        (_forget_that_turns_end, Setup(10, 2, num_steps_in_flight=3, caching=False)),
        (_free_drafts_by_what_is_scheduled, Setup(num_steps_in_flight=2, num_drafts=2)),
        (_write_before_earlier_steps_have_run, Setup(num_steps_in_flight=2, caching=False)),
        (_free_one_token_early, Setup()),
        (_stop_freeing_at_holes, Setup(prefill_pages=PrefillPages.SURVIVORS)),
        (_need_one_page_fewer, Setup(num_pages=24)),
        (_promise_one_page_fewer, Setup(prefill_pages=PrefillPages.SURVIVORS)),
        (_grant_before_others_took_theirs, Setup(num_pages=40, kinds=("sliding", "full"))),
        (_cache_answers, Setup(phase=Phase.PREFILL)),
        (_look_answers_up, Setup(num_pages=40, phase=Phase.PREFILL, kinds=("sliding",))),
        (_free_the_end_of_prompts, Setup(num_pages=90, phase=Phase.DECODE)),
        (_free_windows_one_token_early, Setup(num_pages=90, phase=Phase.DECODE)),
        (_recompute_nothing, TRANSFERS),
        (_count_loads_as_missing, replace(TRANSFERS, num_pages=24, must_fit=False)),
        (_leave_loads_out_of_counts, TRANSFERS),
    ],
)
def test_mistakes_are_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    rng = random.Random(0)
    walks = [rng.randbytes(3 * STEPS) for _ in range(60)]

    def walk_all() -> None:
        for choices in walks:
            walk(setup, choices)

    walk_all()
    break_it(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        walk_all()
    record_property("summary: mutants killed", 1)


def test_a_prompt_hits_a_freed_page_that_a_step_in_flight_reads() -> None:
    """Both steps read what it holds before the step that writes something else to it."""
    setup = Setup(
        num_pages=40,
        kinds=("sliding",),
        num_steps_in_flight=3,
        prefill_pages=PrefillPages.ALL,
    )
    machine = PageMachine(setup)
    text = list(range(200))
    machine.add(text, 100)
    machine.schedule(24)
    machine.schedule(24)  # reads pages 3 to 5
    [running] = machine.running
    read = running.rows[0][3:6]
    blocks = [machine.pool.blocks[page] for page in read]
    assert all(block.ref_cnt == 1 for block in blocks)
    machine.add([*text[:25], *range(1000, 1020)], 40)
    machine.schedule(24)  # the first request needs pages 9 and above by now
    table = machine.managers[0].req_to_blocks[running.request.request_id]
    assert all(block.is_null for block in table[:9])
    assert machine.happened["hits on freed pages that a step in flight reads"] == 1
    assert machine.running[1].rows[0][3:6] == read
    assert all(block.ref_cnt == 1 for block in blocks)
    while machine.in_flight:
        machine.settle(0)
    machine.drain()
    assert machine.happened["evictions"] > 0
    machine.finish()


def test_grants_leave_half_of_the_pool_free() -> None:
    machine = PageMachine(Setup(num_pages=40, kinds=("sliding",), max_step_tokens=300))
    machine.add(list(range(150)), 140)
    machine.schedule(300)
    assert machine.pool.get_num_free_blocks() == 20
    machine.finish()


@pytest.mark.parametrize(
    "setup",
    [
        Setup(num_pages=12, kinds=("sliding",), max_step_tokens=300),
        Setup(
            window=17,
            page_size=2,
            sink_tokens=1,
            num_pages=17,
            kinds=("sliding",),
            max_step_tokens=8,
            caching=False,
            num_lookahead=4,
            prefill_pages=PrefillPages.ALL,
        ),
        Setup(num_pages=115, num_steps_in_flight=2, num_drafts=2, max_step_tokens=100),
        Setup(num_pages=140, spare_tokens=6, phase=Phase.DECODE),
        *(
            # The null page, window and survivors with the tokens that a session may drop.
            Setup(
                num_pages=9 + extra,
                kinds=("sliding",),
                max_step_tokens=300,
                num_steps_in_flight=2,
                prefill_pages=PrefillPages.SURVIVORS,
            )
            for extra in (0, 1)
        ),
        Setup(num_pages=90, num_steps_in_flight=2, transfers=True),
    ],
)
def test_every_request_gets_done_in_a_pool_for_one(setup: Setup) -> None:
    rng = random.Random(1)
    for _ in range(8):
        walk(setup, rng.randbytes(3 * STEPS), to_the_end=True)


def test_a_session_goes_on_in_a_pool_for_one_request() -> None:
    """What it holds while the user thinks is not charged again."""
    setup = Setup(kinds=("sliding",), caching=False)
    cap = WindowPages(setup.window, setup.page_size).max_held(1, setup.max_step_tokens)
    machine = PageMachine(replace(setup, num_pages=cap + 1))
    machine.add(list(range(300)), 100, rest_at=150)
    machine.drain()
    assert machine.happened["turns of a session"] == 1
    machine.finish()


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 4])
def test_sent_again_the_same_prompt_hits_with_eagle(num_drafts: int) -> None:
    """EAGLE's hits drop their last page and so need one page more below it."""

    def hits(policy: PrefillPages) -> list[int]:
        found = []
        for length in range(40, 80):
            machine = PageMachine(
                Setup(
                    num_pages=200,
                    max_step_tokens=300,
                    num_drafts=num_drafts,
                    num_lookahead=num_drafts,
                    drops_last_hit=True,
                    prefill_pages=policy,
                    retention_interval=0,
                )
            )
            for _ in range(2):
                machine.add(list(range(length + 1)), length)
                machine.drain()
            machine.finish()
            found.append(machine.happened["prefix hits"])
        return found

    assert hits(PrefillPages.SURVIVORS) == hits(PrefillPages.ALL) == [1] * 40
