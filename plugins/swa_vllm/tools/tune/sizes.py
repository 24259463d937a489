"""What candidates take and gain, by the arithmetic of ``swa plan``."""

from dataclasses import dataclass, field, replace
from typing import Any

from swa_backend.pages import max_partial_tokens
from swa_backend.request_pages import PagePolicy
from swa_backend.window import Phase
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.pools import Model, need_in_pool, plan_pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits
from swa_vllm.tools.tune.candidates import FULL, Candidate, Objective

# Requests of full attention that the pool holds where no memory is given.
_REQUESTS_OF_FULL = 16


@dataclass(frozen=True)
class Gain:
    """What a candidate takes and gains, by the arithmetic of ``swa plan``.

    Attributes:
        num_groups: KV groups.
        num_bytes: KV cache of a request at its end, padding included, on average over where in a
            page that is.
        first_token: work until the first token, as a part of full attention's: products of weights
            and of attention, so a model of its time where arithmetic is what takes it.
    """

    num_groups: int
    num_bytes: int
    first_token: float

    def cost(self, objective: Objective) -> float:
        """Say what is to be small; for throughput bytes, which take no time to count."""
        return self.first_token if objective is Objective.TTFT else self.num_bytes


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer by which the work of a prompt is reckoned.

    Attributes:
        num_weights: weights that a token is multiplied with.
        num_heads: query heads.
    """

    num_weights: int
    num_heads: int


def layer_shape_of(hf_config: Any) -> Shape:
    """Read the sizes of a layer from Hugging Face's config of a Qwen3, dense or MoE."""
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * head_dim * (heads + hf_config.num_key_value_heads)
    experts = getattr(hf_config, "num_experts_per_tok", None)
    width = hf_config.intermediate_size
    if experts:
        width = experts * hf_config.moe_intermediate_size
    return Shape(attention + 3 * hidden * width, heads)


@dataclass
class Sizer:
    """Sizes of candidates, for requests of one size in one pool.

    Attributes:
        model: with full attention in all layers.
        memory: bytes of the pool; None for what 16 requests of full attention take.
        longest_part: tokens of the longest prompt, and of the longest answer; by default the
            workload's.
    """

    model: Model
    shape: Shape
    limits: Limits
    workload: Workload
    device: Device
    memory: int | None = None
    longest_part: tuple[int, int] | None = None
    _sized: dict[Candidate, Gain] = field(default_factory=dict)
    _running: dict[Candidate, float | None] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.model.windows)

    def longest(self, phase: Phase) -> int:
        """Count the tokens of the longest text in which a phase has a window."""
        prompt, answer = self.longest_part or (self.workload.num_prompt, self.workload.num_output)
        if phase is Phase.BOTH:
            return self.limits.max_model_len
        return prompt if phase is Phase.PREFILL else answer

    def gain(self, candidate: Candidate) -> Gain:
        """Size a candidate; which layers are full does not matter, but how many."""
        key = self._like(candidate)
        if key not in self._sized:
            arm, model, limits = self._planned(key)
            self._sized[key] = Gain(
                num_groups=sum(group.num_groups for group in model.groups(arm, limits)),
                num_bytes=self.num_bytes(key),
                first_token=self._work(key) / self._work(FULL),
            )
        return self._sized[key]

    def running(self, candidate: Candidate) -> float | None:
        """Count the requests that run at once; None where the engine does not start."""
        key = self._like(candidate)
        if key not in self._running:
            arm, model, limits = self._planned(key)
            pool = plan_pool(arm, model, limits, self._pool_bytes())
            self._running[key] = need_in_pool(arm, model, pool, limits, self.workload).running
        return self._running[key]

    def num_bytes(self, candidate: Candidate) -> int:
        """Count the bytes of a request at its end, on average over where in a page that is."""
        arm, model, limits = self._planned(self._like(candidate))
        page, last = limits.block_size, self.workload.num_prompt + self.workload.num_output
        ends = range(max(1, last - page + 1), last + 1)
        groups = model.groups(arm, limits, self.workload.num_prompt)
        size = max(group.most_layers(range(self.num_layers)) for group in groups)
        num_pages = sum(
            group.num_groups * _pages_held(group.policy, end) for group in groups for end in ends
        )
        return num_pages * size * model.layer_page_bytes(page) // len(ends)

    def _like(self, candidate: Candidate) -> Candidate:
        """Make the candidate of the same size whose first layers are the full ones."""
        if candidate.by_layer:
            return replace(candidate, full_layers=(), by_layer=tuple(sorted(candidate.by_layer)))
        return replace(candidate, full_layers=tuple(range(len(candidate.full_layers))))

    def _planned(self, candidate: Candidate) -> tuple[Arm, Model, Limits]:
        arm = Arm.FULL if candidate.window is None else Arm.SWA
        limits = replace(self.limits, spare_tokens=self._spare_tokens(candidate))
        model = replace(
            self.model,
            windows=candidate.windows(self.num_layers),
            sink_tokens=candidate.sinks,
            phase=candidate.phase,
        )
        return arm, model, limits

    def _spare_tokens(self, candidate: Candidate) -> int:
        """Count the slots behind the newest token: on CPUs copies lie there."""
        if self.device is not Device.CPU or candidate.phase is Phase.PREFILL:
            return 0
        if candidate.phase is Phase.DECODE:
            return max_partial_tokens(self.limits.block_size)
        return candidate.sinks

    def _pool_bytes(self) -> int:
        if self.memory is not None:
            return self.memory
        pool = plan_pool(Arm.FULL, self.model, self.limits, None)
        need = need_in_pool(Arm.FULL, self.model, pool, self.limits, self.workload)
        pages = max(_REQUESTS_OF_FULL * need.last_pages, pool.promised_pages)
        return (pages + 1) * pool.page_bytes  # vLLM never gives out the first page

    def _work(self, candidate: Candidate) -> int:
        """Count the multiplications of a prompt in all layers."""
        length, pairs = self.workload.num_prompt, 0
        for window in candidate.windows(self.num_layers):
            everything = window is None or candidate.phase is Phase.DECODE
            seen = length if everything else min((window or 0) + candidate.sinks, length)
            pairs += seen * (seen + 1) // 2 + (length - seen) * seen
        attention = 2 * self.shape.num_heads * self.model.head_dim * pairs
        return self.num_layers * length * self.shape.num_weights + attention


def _pages_held(policy: PagePolicy, num_tokens: int) -> int:
    """Count the pages of a decoding request whose newest of ``num_tokens`` is not computed yet."""
    dead = range(0) if policy.window is None else policy.window.dead(num_tokens - 1)
    return policy.num_entries(num_tokens) - len(dead)
