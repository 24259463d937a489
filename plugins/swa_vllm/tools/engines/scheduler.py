"""vLLM's real scheduler and KV cache managers without a model: what runs, and in which pages."""

import json
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import swa_vllm
from swa_backend.config import PrefillPages
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.common.sizing import Arm

# Of layers that do not exist; only their number of pages counts.
_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
}
SAMPLED_TOKEN = 7


@dataclass(frozen=True)
class Engine:
    """What an engine is set up with.

    Attributes:
        num_pages: of the pool, a page for the layers of a group.
        num_steps_in_flight: 1, or 2 as with asynchronous scheduling.
        retention_interval: vLLM's ``prefix_cache_retention_interval``; None keeps every page.
        sink_tokens: leading tokens that this plugin's sliding layers keep.
        spare_tokens: slots behind the newest token, as this plugin's CPU backend needs for sinks.
        num_sliding_groups: KV groups of sliding layers.
        num_full_groups: KV groups of full layers beside them.
    """

    window: int
    block_size: int
    num_pages: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_seqs: int = 256
    num_steps_in_flight: int = 1
    prefix_caching: bool = False
    prefill_pages: PrefillPages = PrefillPages.AUTO
    retention_interval: int | None = 0
    sink_tokens: int = 0
    spare_tokens: int = 0
    num_sliding_groups: int = 1
    num_full_groups: int = 0


@dataclass(frozen=True)
class Outcome:
    """What happened.

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
    """Serve ``requests`` of (prompt, output) tokens, all there at the start."""
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
    """A scheduler that can be stepped.

    Attributes:
        num_cached_tokens: what the prefix cache served of each request's prompt.
        num_running: requests in each step so far.
    """

    def __init__(self, arm: Arm, engine: Engine, *, count_pages: bool = True) -> None:
        swa_vllm.register()
        self._count_pages = count_pages
        init_none_hash(sha256)
        self.engine = engine
        self.config = _vllm_config(engine)
        specs = _specs(arm, engine, self.config)
        self.cap = sum(
            spec.max_memory_usage_bytes(self.config) // spec.page_size_bytes for spec in specs
        )
        self.starts = engine.num_pages - 1 >= self.cap  # vLLM never gives out the first page
        kind = AsyncScheduler if engine.num_steps_in_flight > 1 else Scheduler
        self.scheduler = kind(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(
                num_blocks=engine.num_pages,
                kv_cache_tensors=[],
                kv_cache_groups=[
                    KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)
                ],
                prefix_cache_retention_interval=None
                if arm is Arm.FULL
                else engine.retention_interval,
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
        """Queue a request."""
        request = Request(
            request_id=name,
            prompt_token_ids=[token % _MODEL["vocab_size"] for token in prompt],  # type: ignore[operator]
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
            self.note(output)
            self._queue.append((output, self._samples(output)))
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

    def note(self, output: Any) -> None:
        """Called with every step that serves something, once its pages are taken."""
        if self._count_pages:
            most = max(map(self.num_pages_of, output.num_scheduled_tokens))
            self._peak_pages = max(self._peak_pages, most)

    @property
    def all_decode(self) -> bool:
        """Whether every request has had its whole prompt computed."""
        return all(r.num_output_tokens > 0 for r in self.scheduler.requests.values())

    def outcome(self) -> Outcome:
        """What happened so far."""
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

    def _samples(self, output: Any) -> list[list[int]]:
        """A token for each request whose prompt the step completes."""
        requests = self.scheduler.requests
        return [
            [] if requests[name].is_prefill_chunk else [SAMPLED_TOKEN]
            for name in output.num_scheduled_tokens
        ]

    def num_pages_of(self, name: str) -> int:
        """Pages that a request holds now, in all groups."""
        tables = (manager.req_to_blocks.get(name, ()) for manager in self.managers)
        return sum(not block.is_null for table in tables for block in table)


def _vllm_config(engine: Engine) -> VllmConfig:
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w") as file:
            json.dump(_MODEL, file)
        config = EngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=engine.block_size,
            max_model_len=engine.max_model_len,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
            enable_prefix_caching=engine.prefix_caching,
            enforce_eager=True,
        ).create_engine_config()
    # CPUs have no asynchronous scheduling, but the scheduler of it runs anywhere.
    config.scheduler_config.async_scheduling = engine.num_steps_in_flight > 1
    config.cache_config.num_gpu_blocks = engine.num_pages
    if config.max_concurrent_batches != engine.num_steps_in_flight:
        raise ValueError(
            f"steps in flight must be 1 or 2 with this vLLM, got {engine.num_steps_in_flight}"
        )
    return config


def _specs(arm: Arm, engine: Engine, config: VllmConfig) -> list[KVCacheSpec]:
    """The spec of every group, full layers' first."""
    common: dict[str, Any] = {
        "block_size": engine.block_size,
        "num_kv_heads": 1,
        "head_size": 64,
        "dtype": torch.float32,
    }
    full = FullAttentionSpec(**common)
    sliding: KVCacheSpec = SlidingWindowSpec(**common, sliding_window=engine.window)
    if arm is Arm.FULL:
        sliding = full
    elif arm is Arm.SWA:
        sliding = SWASpec.from_stock(
            sliding,
            config,
            engine.prefill_pages,
            sink_tokens=engine.sink_tokens,
            spare_tokens=engine.spare_tokens,
        )
    return [full] * engine.num_full_groups + [sliding] * engine.num_sliding_groups
