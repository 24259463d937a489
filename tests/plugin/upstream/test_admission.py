"""Steps in flight, and the pages that a request is promised."""

from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
)

from swa_backend.options import PrefillPages
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.scheduler import Simulation
from swa_vllm.tools.engines.simulated import Engine
from tests.plugin.upstream.pages import (
    ALL,
    AUTO,
    POLICIES,
    full_spec,
    make_request,
    stock_spec,
    windowed_spec,
)


class Watched(Simulation):
    """Counts the null entries of the request's table when a step is scheduled."""

    def record_step(self, output: Any) -> None:
        self.num_null = [
            *getattr(self, "num_null", ()),
            sum(block.is_null for block in self.managers[0].req_to_blocks["r"]),
        ]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_pages_that_no_later_step_reads_are_freed(num_steps: int) -> None:
    engine = Engine(16, 16, 100, 512, 512, num_steps_in_flight=num_steps, prefill_pages=ALL)
    simulation = Watched(Arm.SWA, engine)
    simulation.add("r", range(100), 4)
    while simulation.step():
        pass
    assert simulation.num_null[:4] == [0, 5, 5, 5]


@pytest.mark.parametrize(("frees_by_schedule", "num_freed"), [(True, 5), (False, 0)])
def test_pages_that_a_step_in_flight_reads_are_freed_where_nothing_is_rolled_back(
    frees_by_schedule: bool, num_freed: int
) -> None:
    spec = windowed_spec(16, 16, num_steps_in_flight=2, frees_by_schedule=frees_by_schedule)
    kv = KVCacheManager(
        KVCacheConfig(100, [], [KVCacheGroupSpec(["s"], spec)]),
        max_model_len=512,
        scheduler_block_size=16,
        hash_block_size=16,
        max_in_flight_tokens=1024,
        enable_caching=False,
    )
    request = make_request("r", range(101), 16)
    assert kv.allocate_slots(request, 100) is not None
    request.num_computed_tokens = request.num_in_flight_tokens = 100
    assert kv.allocate_slots(request, 1) is not None
    table = kv.coordinator.single_type_managers[0].req_to_blocks["r"]
    assert sum(block.is_null for block in table) == num_freed


def test_where_nothing_is_rolled_back_one_step_is_promised() -> None:
    def promised(num_steps: int, policy: PrefillPages) -> int:
        spec = windowed_spec(
            1024,
            16,
            policy,
            num_steps_in_flight=num_steps,
            frees_by_schedule=True,
            rollback_tokens=num_steps - 1,
        )
        return spec.max_admission_blocks_per_request(num_steps * 8192, 32768)

    assert [promised(n, AUTO) for n in (1, 2, 3)] == [130, 130, 131]
    assert [promised(n, ALL) for n in (1, 2, 3)] == [577, 577, 578]


@pytest.mark.parametrize(("num_pages", "starts"), [(131, True), (130, False)])
def test_a_pool_for_a_window_and_the_survivors_of_one_chunk_serves(
    num_pages: int, starts: bool
) -> None:
    """With two steps in flight; vLLM keeps one page of the pool for itself."""
    engine = Engine(1024, 16, num_pages, 8192, 40960, num_steps_in_flight=2)
    simulation = Simulation(Arm.SWA, engine)
    assert simulation.starts is starts
    if starts:
        for name in "ab":
            simulation.add(name, range(32000), 64)
        while simulation.step():
            pass
        assert not simulation.scheduler.has_unfinished_requests()
        assert simulation.outcome().peak_pages == 129  # chunks end where pages do


def test_what_is_promised_with_drafts_grows_with_steps_in_flight() -> None:
    def promised(policy: PrefillPages, chunk: int) -> list[int]:
        return [
            windowed_spec(1024, 16, policy, num_steps_in_flight=n).max_admission_blocks_per_request(
                n * chunk, 32768
            )
            for n in (1, 2)
        ]

    for policy in POLICIES:  # chunks too short to leave holes
        assert promised(policy, 1024) == [129, 193]
    assert promised(ALL, 8192) == [577, 1089]
    assert promised(AUTO, 8192) == promised(PrefillPages.SURVIVORS, 8192) == [130, 195]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_pool_that_starts_admits_a_prompt_longer_than_what_is_promised(
    policy: PrefillPages,
) -> None:
    full, sliding = full_spec(16), windowed_spec(64, 16, policy)
    cap = sliding.max_admission_blocks_per_request(128, 1024)
    assert cap <= 13
    config = KVCacheConfig(
        num_blocks=64 + cap + 1,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["f"], full), KVCacheGroupSpec(["s"], sliding)],
    )
    kv = KVCacheManager(
        config,
        max_model_len=1024,
        scheduler_block_size=16,
        hash_block_size=16,
        max_in_flight_tokens=128,
        enable_caching=True,
    )
    request = make_request("r", range(32 * 16), 16)
    assert kv.allocate_slots(request, 16, full_sequence_must_fit=True) is not None


@pytest.mark.parametrize("frees_by_schedule", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_cap_is_never_above_vllms(num_steps: int, frees_by_schedule: bool) -> None:
    for window in [*range(1, 100), 511, 512, 1024, 4096]:
        stock = stock_spec(window, 32)
        here = windowed_spec(
            window,
            32,
            PrefillPages.SURVIVORS,
            num_steps_in_flight=num_steps,
            frees_by_schedule=frees_by_schedule,
            rollback_tokens=(num_steps - 1) * frees_by_schedule,
        )
        for chunk in (1, 16, 100, 2048, 8192):
            for longest in (40, 1000, 40960):
                sizes = (num_steps * chunk, longest)
                assert here.max_admission_blocks_per_request(*sizes) <= (
                    stock.max_admission_blocks_per_request(*sizes)
                )
