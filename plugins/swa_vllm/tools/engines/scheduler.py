"""vLLM's real scheduler and KV cache managers, stepped without a model or a device."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import swa_vllm
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.simulated import MODEL, Engine, simulated_config, simulated_specs

SAMPLED_TOKEN = 7


@dataclass(frozen=True)
class Outcome:
    """What vLLM's scheduler made of some requests.

    Attributes:
        starts: whether vLLM would start the engine: the pool holds one longest request.
        estimate: vLLM's start-up "maximum concurrency", of requests of ``max_model_len``.
        mean_running: requests in a step, on average.
        promised_pages: what admission reserves for a request of ``max_model_len``.
        peak_pages: most pages that one request held.
    """

    starts: bool
    estimate: float
    num_steps: int
    mean_running: float
    promised_pages: int
    peak_pages: int
    num_preemptions: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def simulate(arm: Arm, engine: Engine, requests: Sequence[tuple[int, int]]) -> Outcome:
    """Serve ``requests`` of (prompt, output) tokens, all there at the start.

    Raises:
        RuntimeError: the scheduler stopped before all were served.
    """
    simulation = Simulation(arm, engine)
    if simulation.starts:
        for index, (num_prompt, num_output) in enumerate(requests):
            simulation.add(str(index), range(index, index + num_prompt), num_output)
        while simulation.step():
            pass
        if simulation.scheduler.has_unfinished_requests():
            raise RuntimeError(f"{arm.value} stopped with requests that it cannot serve")
    return simulation.outcome()


class Simulation:
    """vLLM's scheduler with the page managers of one arm, stepped by hand.

    Attributes:
        cap: pages that admission reserves for a request of ``max_model_len``.
        starts: whether vLLM would start the engine: the pool holds such a request.
        num_cached_tokens: what the prefix cache served of each request's prompt.
        num_running: requests in each step so far.
    """

    def __init__(self, arm: Arm, engine: Engine, *, count_pages: bool = True) -> None:
        swa_vllm.register()
        self._count_pages = count_pages
        init_none_hash(sha256)
        self.engine = engine
        self.config = simulated_config(engine)
        specs = simulated_specs(arm, engine, self.config)
        self.cap = sum(
            spec.max_memory_usage_bytes(self.config) // spec.page_size_bytes for spec in specs
        )
        self.starts = engine.num_pages - 1 >= self.cap  # vLLM never gives out the first page
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
        interval = None if arm is Arm.FULL else engine.retention_interval
        kind = AsyncScheduler if engine.num_steps_in_flight > 1 else Scheduler
        self.scheduler = kind(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(
                num_blocks=engine.num_pages,
                kv_cache_tensors=[],
                kv_cache_groups=groups,
                prefix_cache_retention_interval=interval,
            ),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=engine.block_size,
        )
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self._hasher = get_request_block_hasher(engine.block_size, sha256)
        self.num_cached_tokens: dict[str, int] = {}
        self._queue: deque[Any] = deque()
        self.num_running: list[int] = []
        self._peak_pages = 0
        self._num_preemptions = 0

    def add(self, name: str, prompt: Sequence[int], num_output: int) -> None:
        """Queue a request whose answer has ``num_output`` tokens."""
        request = Request(
            request_id=name,
            prompt_token_ids=[token % MODEL["vocab_size"] for token in prompt],
            sampling_params=SamplingParams(max_tokens=num_output, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher if self.engine.prefix_caching else None,
        )
        self.scheduler.add_request(request)

    def step(self) -> bool:
        """Schedule a step and, where enough are in flight, settle the oldest; false at the end."""
        output = self.scheduler.schedule() if self.scheduler.has_requests() else None
        if output is not None:
            self._num_preemptions += len(output.preempted_req_ids or ())
        if output is not None and output.total_num_scheduled_tokens:
            self.num_running.append(len(output.num_scheduled_tokens))
            for new in output.scheduled_new_reqs:
                self.num_cached_tokens[new.req_id] = new.num_computed_tokens
            self.record_step(output)
            self._queue.append((output, self._sample_tokens(output)))
            if len(self._queue) < self.engine.num_steps_in_flight:
                return True
        if not self._queue:
            return False
        settled, tokens = self._queue.popleft()
        names = list(settled.num_scheduled_tokens)
        self.scheduler.update_from_output(
            settled,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=tokens,
            ),
        )
        return True

    def record_step(self, output: Any) -> None:
        """Record a step that serves something, once its pages are taken; subclasses record more."""
        if self._count_pages:
            most = max(map(self.num_pages_of, output.num_scheduled_tokens))
            self._peak_pages = max(self._peak_pages, most)

    @property
    def all_decode(self) -> bool:
        """Whether every request has had its whole prompt computed."""
        return all(r.num_output_tokens > 0 for r in self.scheduler.requests.values())

    def outcome(self) -> Outcome:
        """Sum up what happened so far."""
        num_steps = len(self.num_running)
        return Outcome(
            starts=self.starts,
            estimate=round(self.engine.num_pages / self.cap, 1),
            num_steps=num_steps,
            mean_running=round(sum(self.num_running) / num_steps, 2) if num_steps else 0.0,
            promised_pages=self.cap,
            peak_pages=self._peak_pages,
            num_preemptions=self._num_preemptions,
        )

    def _sample_tokens(self, output: Any) -> list[list[int]]:
        """Sample a token for each request whose prompt the step completes."""
        requests = self.scheduler.requests
        return [
            [] if requests[name].is_prefill_chunk else [SAMPLED_TOKEN]
            for name in output.num_scheduled_tokens
        ]

    def num_pages_of(self, name: str) -> int:
        """Count the pages that a request holds now, in all groups."""
        tables = (manager.req_to_blocks.get(name, ()) for manager in self.managers)
        return sum(not block.is_null for table in tables for block in table)

    def num_computed_of(self, name: str) -> int:
        """Count the tokens of a request that are computed; none once it has ended."""
        request = self.scheduler.requests.get(name)
        return 0 if request is None else request.num_computed_tokens
