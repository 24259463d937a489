"""The planner's arithmetic against vLLM's own scheduler and start-up, without any engine."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

import swa_vllm
from swa_backend.options import PrefillPages
from swa_backend.pages import ceil_div, max_partial_tokens
from swa_backend.window import Phase
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.pools import Model, plan_pool
from swa_vllm.tools.common.queueing import Queue, Workload
from swa_vllm.tools.common.sizing import KVGroups, Limits, kv_groups_of, stages_of
from swa_vllm.tools.engines.scheduler import Simulation
from swa_vllm.tools.engines.simulated import Engine
from tests.helpers.start_up import plan_kv_caches

pytestmark = pytest.mark.only_on("0.32/V1", "0.33/V1")  # vLLM is the oracle


@pytest.fixture(autouse=True, scope="module")
def _known_model() -> None:
    """vLLM inspects a class that it has not imported in a new process, which costs seconds."""
    swa_vllm.register()
    name = "Qwen3ForCausalLM"
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _limits(engine: Engine) -> Limits:
    return Limits(
        engine.block_size,
        engine.max_model_len,
        engine.max_num_batched_tokens,
        engine.max_num_seqs,
        engine.num_steps_in_flight,
        engine.spare_tokens,
    )


@dataclass(frozen=True)
class Traffic:
    """An engine, and requests that are all there at the start."""

    engine: Engine
    workload: Workload


def _traffic(seed: int, phase: Phase = Phase.BOTH) -> Traffic:
    """Small sizes of every kind; the pool always holds one request, and rarely many."""
    pick = random.Random(seed)
    num_prompt, num_output = pick.randint(1, 300), pick.randint(1, 60)
    if phase is Phase.DECODE:  # a window is to leave the prompt, also of one that starts over
        num_output *= 6
    sinks = pick.choice([0, 0, 4, 20])
    engine = Engine(
        window=pick.choice([1, 7, 16, 40, 100]),
        block_size=pick.choice([16, 32]),
        num_pages=10**6,
        max_num_batched_tokens=pick.choice([24, 64, 500]),
        max_model_len=num_prompt + num_output + pick.choice([0, 0, 200]),
        max_num_seqs=pick.choice([4, 16]),
        num_steps_in_flight=pick.choice([1, 2]),
        sink_tokens=sinks,
        spare_tokens=pick.choice([0, sinks]),
        num_sliding_groups=pick.choice([1, 1, 3]),
        num_full_groups=pick.choice([0, 1, 2]),
        phase=phase,
        # Only then are admission's promises to a request that comes back those of its window.
        prefix_caching=phase is Phase.DECODE,
    )
    # As the least that any arm starts with is full attention's or stock vLLM's, by the sizes.
    needed = max(
        sum(g.num_groups * (g.policy.cap or g.policy.num_entries(engine.max_model_len)) for g in gs)
        for arm in Arm
        if (gs := _groups(arm, engine, None))
    )
    engine = replace(engine, num_pages=1 + needed + pick.choice([0, 3, needed, 4 * needed]))
    return Traffic(engine, Workload(num_prompt, num_output, pick.randint(1, 12)))


def _groups(arm: Arm, engine: Engine, num_prompt: int | None) -> list[KVGroups]:
    """As many groups of each kind as the engine has, one layer each."""
    kinds = {None: engine.num_full_groups, engine.window: engine.num_sliding_groups}
    return [
        replace(group, num_groups=count)
        for window, count in kinds.items()
        if count
        for group in kv_groups_of(
            arm,
            (window,) * count,
            engine.sink_tokens,
            _limits(engine),
            engine.phase,
            num_prompt,
        )
    ]


@pytest.mark.parametrize("arm", Arm)
@pytest.mark.parametrize("seed", range(40))
def test_every_step_is_that_of_vllms_scheduler(arm: Arm, seed: int) -> None:
    """The requests it serves, and the pages that all of them hold then."""
    _compare_every_step(arm, _traffic(seed))


@pytest.mark.parametrize("seed", range(40))
def test_every_step_is_that_of_vllms_scheduler_where_prompts_stay(seed: int) -> None:
    _compare_every_step(Arm.SWA, _traffic(seed, Phase.DECODE))


def _compare_every_step(arm: Arm, traffic: Traffic) -> None:
    real = Simulation(arm, traffic.engine, count_pages=False)
    assert real.starts
    model = Queue(
        _groups(arm, traffic.engine, traffic.workload.num_prompt),
        traffic.engine.num_pages,
        _limits(traffic.engine),
        traffic.workload,
    )
    for index in range(traffic.workload.num_requests or 0):
        real.add(
            str(index),
            range(index, index + traffic.workload.num_prompt),
            traffic.workload.num_output,
        )
        # A plan has no prefixes in the cache, not even those that a preempted request left there.
        real.scheduler.requests[str(index)].skip_reading_prefix_cache = True
    pool = real.scheduler.kv_cache_manager.block_pool
    goes_on = True
    while goes_on:
        goes_on = real.step()
        assert model.step() is goes_on
        assert model.num_running == real.num_running
        assert model.num_held == traffic.engine.num_pages - 1 - pool.get_num_free_blocks()
    assert model.num_finished == traffic.workload.num_requests
    assert model.num_preemptions == real.outcome().num_preemptions


@pytest.fixture(scope="module")
def vllm_config() -> VllmConfig:
    """Of an engine of pages of 16 tokens and chunks of 100, two in flight; texts of 1000."""
    engine = Engine(64, 16, 64, 100, 1000, max_num_seqs=16, num_steps_in_flight=2)
    config = Simulation(Arm.SWA, engine).config
    config.cache_config.kv_cache_layout = "LBHNC"
    config.cache_config.num_gpu_blocks_override = None
    return config


def _spec(
    arm: Arm, window: int | None, sinks: int, config: VllmConfig, phase: Phase = Phase.BOTH
) -> KVCacheSpec:
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    full = FullAttentionSpec(**shape)
    if arm is Arm.SWA and phase is Phase.DECODE:
        if window is None:
            return PromptCacheSpec.from_stock(full, None)
        sizes = {"max_in_flight_tokens": 200, "spare_tokens": SPARE}
        return PromptWindowSpec.from_stock(full, None, window=window, sink_tokens=sinks, **sizes)
    if window is None or arm is Arm.FULL:
        return full
    stock = SlidingWindowSpec(**shape, sliding_window=window)
    if arm is Arm.STOCK:
        return stock
    return SWASpec.from_stock(stock, config, StoragePolicy(sinks, 0, PrefillPages.AUTO))


# This plugin's arm has phases.
ARMS_AND_PHASES = [*((arm, Phase.BOTH) for arm in Arm), (Arm.SWA, Phase.DECODE)]
SPARE = max_partial_tokens(16)


@pytest.mark.parametrize("num_full", range(9))
@pytest.mark.parametrize("sinks", [0, 20])
@pytest.mark.parametrize(("arm", "phase"), ARMS_AND_PHASES)
def test_pools_are_what_vllm_makes_of_the_layers(
    arm: Arm, phase: Phase, sinks: int, num_full: int, vllm_config: VllmConfig
) -> None:
    """Groups, layers in each, pages in 64 MiB, and the estimate of its start-up line."""
    spare = SPARE if phase is Phase.DECODE else 0
    memory, limits = 64 << 20, Limits(16, 1000, 100, 16, 2, spare)
    for num_sliding in range(num_full == 0, 14):
        windows = (None,) * num_full + (64,) * num_sliding
        specs = {
            f"layer.{i}": _spec(arm, w, sinks, vllm_config, phase) for i, w in enumerate(windows)
        }
        (config,) = plan_kv_caches(vllm_config, [specs], [memory])
        pool = plan_pool(arm, Model(windows, sinks, 2, 64, 2, phase), limits, memory)
        planned = sorted(
            (group.policy.window is not None, group.num_layers, group.num_groups)
            for group in pool.groups
        )
        real = config.kv_cache_groups
        assert planned == sorted(
            (
                kind not in (FullAttentionSpec, PromptCacheSpec),
                sum(len(g.layer_names) for g in real if type(g.kv_cache_spec) is kind),
                sum(type(g.kv_cache_spec) is kind for g in real),
            )
            for kind in {type(group.kv_cache_spec) for group in real}
        )
        assert pool.num_pages == config.num_blocks
        assert pool.page_bytes == max(
            len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in real
        )
        assert pool.estimate == get_kv_cache_capacity(vllm_config, config)[1]


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_pools_of_pipeline_stages_are_what_vllm_makes_of_them(
    num_stages: int, vllm_config: VllmConfig
) -> None:
    """The stage with the fewest pages decides for all."""
    pick = random.Random(num_stages)
    for _ in range(30):
        num_layers = pick.randint(num_stages, 14)
        windows = tuple(pick.choice([None, 64, 64]) for _ in range(num_layers))
        model = Model(windows, 0, 2, 64, 2, num_stages=num_stages)
        assert model.stages == tuple(
            range(*get_pp_indices(num_layers, rank, num_stages)) for rank in range(num_stages)
        )
        specs = [
            {f"layer.{i}": _spec(Arm.SWA, windows[i], 0, vllm_config, Phase.BOTH) for i in stage}
            for stage in model.stages
        ]
        memory = 64 << 20
        configs = plan_kv_caches(vllm_config, specs, [memory] * num_stages)
        pool = plan_pool(Arm.SWA, model, Limits(16, 1000, 100, 16, 2), memory)
        assert {config.num_blocks for config in configs} == {pool.num_pages}


@pytest.mark.parametrize("partition", ["3,1", "1,3", " 2,02", "4"])
def test_stages_are_divided_by_vllms_variable(
    partition: str, vllm_variables: pytest.MonkeyPatch
) -> None:
    vllm_variables.setenv("VLLM_PP_LAYER_PARTITION", partition)
    size = len(partition.split(","))
    expected = tuple(range(*get_pp_indices(4, rank, size)) for rank in range(size))
    assert stages_of(4, size, partition) == expected


@pytest.mark.parametrize("partition", ["", "2", "2,1", "2,1,1", "2,two", "2;2"])
def test_a_partition_that_vllm_refuses_is_refused(
    partition: str, vllm_variables: pytest.MonkeyPatch
) -> None:
    vllm_variables.setenv("VLLM_PP_LAYER_PARTITION", partition)
    with pytest.raises(ValueError, match="partition"):
        get_pp_indices(4, 0, 2)
    with pytest.raises(ValueError, match=rf"VLLM_PP_LAYER_PARTITION={partition} does not divide"):
        stages_of(4, 2, partition)


@pytest.mark.parametrize("partition", ["4,0", "0,4", "5,-1"])
def test_a_partition_with_a_stage_without_layers_is_refused(partition: str) -> None:
    """As engines with a window refuse it."""
    with pytest.raises(ValueError, match=rf"VLLM_PP_LAYER_PARTITION={partition} .* unset it"):
        stages_of(4, 2, partition)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="5 is more than this model's 4 layers; give fewer"):
        stages_of(4, 5)


def test_a_request_whose_prompt_stays_is_charged_what_its_manager_charges(
    vllm_config: VllmConfig,
) -> None:
    spec = _spec(Arm.SWA, 64, 4, vllm_config, Phase.DECODE)
    assert isinstance(spec, PromptWindowSpec)
    for chunk in (100, 400):
        spec = replace(spec, max_in_flight_tokens=2 * chunk)
        limits = Limits(16, 1000, chunk, 16, 2, SPARE)
        for prompt in range(1, 1001):
            (group,) = kv_groups_of(Arm.SWA, (64,), 4, limits, Phase.DECODE, prompt)
            assert group.policy.cap == min(spec.charge(prompt), ceil_div(1000 + SPARE, 16))


@pytest.mark.parametrize(("arm", "phase"), ARMS_AND_PHASES)
def test_an_engine_starts_exactly_where_planned(
    arm: Arm, phase: Phase, vllm_config: VllmConfig
) -> None:
    windows = (None, 64, 64, 64)
    specs = {f"layer.{i}": _spec(arm, w, 4, vllm_config, phase) for i, w in enumerate(windows)}
    spare = SPARE if phase is Phase.DECODE else 0
    limits, model = Limits(16, 1000, 100, 16, 2, spare), Model(windows, 4, 2, 64, 2, phase)
    pool = plan_pool(arm, model, limits, 1 << 30)
    least = (pool.promised_pages + 1) * pool.page_bytes
    assert plan_pool(arm, model, limits, least).starts(limits)
    plan_kv_caches(vllm_config, [specs], [least])
    short = plan_pool(arm, model, limits, least - 1)
    assert not short.starts(limits)
    with pytest.raises(ValueError, match="estimated maximum model length is") as error:
        plan_kv_caches(vllm_config, [specs], [least - 1])
    assert f"maximum model length is {short.longest}." in str(error.value)
