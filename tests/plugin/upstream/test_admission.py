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


@pytest.mark.parametrize(("num_steps", "expected"), [(1, [0, 5, 5, 5]), (2, [0, 0, 5, 5])])
def test_pages_that_a_step_in_flight_reads_are_not_freed(
    num_steps: int, expected: list[int]
) -> None:
    engine = Engine(16, 16, 100, 512, 512, num_steps_in_flight=num_steps, prefill_pages=ALL)
    simulation = Watched(Arm.SWA, engine)
    simulation.add("r", range(100), 4)
    while simulation.step():
        pass
    assert simulation.num_null[:4] == expected


def test_what_is_promised_grows_with_steps_in_flight() -> None:
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


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_cap_is_never_above_vllms(num_steps: int) -> None:
    for window in [*range(1, 100), 511, 512, 1024, 4096]:
        stock = stock_spec(window, 32)
        here = windowed_spec(window, 32, PrefillPages.SURVIVORS, num_steps_in_flight=num_steps)
        for chunk in (1, 16, 100, 2048, 8192):
            for longest in (40, 1000, 40960):
                sizes = (num_steps * chunk, longest)
                assert here.max_admission_blocks_per_request(*sizes) <= (
                    stock.max_admission_blocks_per_request(*sizes)
                )
