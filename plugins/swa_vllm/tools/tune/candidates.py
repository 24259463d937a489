"""What may be served: a window, sinks and full layers, and what each takes and gains."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from swa_backend.request_pages import PagePolicy
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.pools import Model, need_in_pool, plan_pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits, kv_groups_of

_SMALLEST_WINDOW = 32
_COUNTS = 4  # of full layers, for each window
# Requests of full attention that the pool holds where no memory is given.
_REQUESTS_OF_FULL = 16


@dataclass(frozen=True)
class Candidate:
    """A window for some layers.

    Attributes:
        window: None for full attention in all layers.
        full_layers: layers without a window, in order.
    """

    window: int | None = None
    sinks: int = 0
    full_layers: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        """Spell it as ``swa`` options."""
        if self.window is None:
            return {"enabled": False}
        sinks = {"sink_tokens": self.sinks} if self.sinks else {}
        full = list(self.full_layers) or "none"
        return {"window": self.window, **sinks, "full_attention_layers": full}

    def text(self) -> str:
        """Name it for a reader."""
        if self.window is None:
            return "full attention"
        return f"window {self.window}, sinks {self.sinks}, full layers {len(self.full_layers)}"


FULL = Candidate()


class Objective(StrEnum):
    """What is to be gained; ``LOSS``: nothing beyond the budget, at the least loss."""

    LOSS = "loss"
    THROUGHPUT = "throughput"
    TTFT = "ttft"
    MEMORY = "memory"


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
    """

    model: Model
    shape: Shape
    limits: Limits
    workload: Workload
    device: Device
    memory: int | None = None
    _sized: dict[tuple[int | None, int, int], Gain] = field(default_factory=dict)
    _running: dict[tuple[int | None, int, int], float | None] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.model.windows)

    def gain(self, candidate: Candidate) -> Gain:
        """Size a candidate; which layers are full does not matter, but how many."""
        key = self._layout(candidate)
        if key not in self._sized:
            self._sized[key] = self._size(*key)
        return self._sized[key]

    def running(self, candidate: Candidate) -> float | None:
        """Count the requests that run at once; None where the engine does not start."""
        key = self._layout(candidate)
        if key not in self._running:
            arm = Arm.FULL if candidate.window is None else Arm.SWA
            model, limits = self._planned(*key)
            pool = plan_pool(arm, model, limits, self._pool_bytes())
            self._running[key] = need_in_pool(arm, model, pool, limits, self.workload).running
        return self._running[key]

    def _layout(self, candidate: Candidate) -> tuple[int | None, int, int]:
        num_full = self.num_layers if candidate.window is None else len(candidate.full_layers)
        return candidate.window, candidate.sinks, num_full

    def num_bytes(self, window: int | None, sinks: int, num_full: int) -> int:
        """Count the bytes of a request at its end, on average over where in a page that is."""
        model, limits = self._planned(window, sinks, num_full)
        arm = Arm.FULL if window is None else Arm.SWA
        page, last = limits.block_size, self.workload.num_prompt + self.workload.num_output
        ends = range(max(1, last - page + 1), last + 1)
        groups = kv_groups_of(arm, model.windows, sinks, limits)
        size = max(group.most_layers(range(self.num_layers)) for group in groups)
        num_pages = sum(
            group.num_groups * _pages_held(group.policy, end) for group in groups for end in ends
        )
        return num_pages * size * model.layer_page_bytes(page) // len(ends)

    def _planned(self, window: int | None, sinks: int, num_full: int) -> tuple[Model, Limits]:
        num_sliding = self.num_layers - num_full
        windows = (None,) * num_full + (window,) * num_sliding
        # Copies of sinks lie behind the newest token, on CPUs.
        spare = sinks if self.device is Device.CPU else 0
        limits = replace(self.limits, spare_tokens=spare)
        return replace(self.model, windows=windows, sink_tokens=sinks), limits

    def _size(self, window: int | None, sinks: int, num_full: int) -> Gain:
        arm = Arm.FULL if window is None else Arm.SWA
        model, limits = self._planned(window, sinks, num_full)
        groups = kv_groups_of(arm, model.windows, sinks, limits)
        return Gain(
            num_groups=sum(group.num_groups for group in groups),
            num_bytes=self.num_bytes(window, sinks, num_full),
            first_token=self._work(window, sinks, num_full) / self._work(None, 0, self.num_layers),
        )

    def _pool_bytes(self) -> int:
        if self.memory is not None:
            return self.memory
        pool = plan_pool(Arm.FULL, self.model, self.limits, None)
        need = need_in_pool(Arm.FULL, self.model, pool, self.limits, self.workload)
        pages = max(_REQUESTS_OF_FULL * need.last_pages, pool.promised_pages)
        return (pages + 1) * pool.page_bytes  # vLLM never gives out the first page

    def _work(self, window: int | None, sinks: int, num_full: int) -> int:
        """Count the multiplications of a prompt in all layers."""
        length = self.workload.num_prompt
        full = length * (length + 1) // 2
        seen = length if window is None else min(window + sinks, length)
        sliding = seen * (seen + 1) // 2 + (length - seen) * seen
        pairs = num_full * full + (self.num_layers - num_full) * sliding
        attention = 2 * self.shape.num_heads * self.model.head_dim * pairs
        return self.num_layers * length * self.shape.num_weights + attention


def _pages_held(policy: PagePolicy, num_tokens: int) -> int:
    """Count the pages of a decoding request whose newest of ``num_tokens`` is not computed yet."""
    dead = range(0) if policy.window is None else policy.window.dead(num_tokens - 1)
    return policy.num_entries(num_tokens) - len(dead)


def windows_to_try(longest: int) -> list[int]:
    """List the windows below ``longest``: powers of two, and those half-way between."""
    windows, window = [], _SMALLEST_WINDOW
    while window < longest:
        windows += [w for w in (window, window * 3 // 2) if w < longest]
        window *= 2
    return windows


def counts_of_full_layers(sizer: Sizer, window: int, sinks: int, limit: int) -> list[int]:
    """List how many layers may be full within ``limit`` bytes, the most first.

    A count is left out where more full layers take no more bytes, for KV groups are padded.
    """
    counts, least = [], limit + 1
    for count in reversed(range(sizer.num_layers)):
        num_bytes = sizer.num_bytes(window, sinks, count)
        if num_bytes < least:
            counts.append(count)
            least = num_bytes
    return counts


def widest_window(sizer: Sizer, sinks: int, num_full: int, longest: int, limit: int) -> int:
    """Find the widest window of whole pages within ``limit`` bytes, or 0."""
    page = sizer.limits.block_size
    least, most = 0, (longest - 1) // page
    while least < most:
        middle = (least + most + 1) // 2
        if sizer.num_bytes(middle * page, sinks, num_full) <= limit:
            least = middle
        else:
            most = middle - 1
    return least * page


def layouts_to_try(
    sizer: Sizer, sinks: Iterable[int], longest: int, limit: int, *, by_loss: bool
) -> list[tuple[int, int, int]]:
    """List what is to be tried within ``limit`` bytes: window, sinks, and number of full layers.

    Args:
        longest: tokens of the longest request, which a window must be below.
        by_loss: as many layers as can be are full, or the fewest: full layers cost a model that was
            trained with a window. Otherwise numbers between are tried too.
    """
    layouts = dict.fromkeys(
        (window, own, count)
        for own in sinks
        for window in windows_to_try(longest - own)
        for count in _spread(counts_of_full_layers(sizer, window, own, limit), by_loss)
    )
    for own in sinks:
        widest = [
            (widest_window(sizer, own, count, longest - own, limit), count)
            for count in range(sizer.num_layers)
        ]
        # Neither a wider window nor more full layers can be had without giving up the other.
        layouts |= dict.fromkeys(
            (window, own, count)
            for window, count in widest
            if window and not any(w >= window and c > count for w, c in widest)
        )
    return list(layouts)


def _spread(counts: Sequence[int], by_loss: bool) -> list[int]:
    if by_loss:
        return [*counts[:1], *counts[1:][-1:]]
    if len(counts) <= _COUNTS:
        return list(counts)
    last = len(counts) - 1
    return [counts[round(step * last / (_COUNTS - 1))] for step in range(_COUNTS)]


def with_full_layers(layout: tuple[int, int, int], order: Sequence[int]) -> Candidate:
    """Make a candidate whose full layers are the first of ``order``."""
    window, sinks, count = layout
    return Candidate(window, sinks, tuple(sorted(order[:count])))
