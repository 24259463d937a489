"""KV cache pools of each arm: their pages, and the requests that they hold.

No vLLM is imported: :mod:`swa_vllm.tools.common.sizing` has the arithmetic of its start-up,
:mod:`swa_vllm.tools.common.queueing` that of its scheduler.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from swa_backend.pages import ceil_div
from swa_backend.window import Phase
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.queueing import Workload, queue_pages_of_one_request, running_at_once
from swa_vllm.tools.common.sizing import KVGroups, Limits, kv_groups_of, stages_of


@dataclass(frozen=True)
class Model:
    """The sizes of a model that its KV cache depends on.

    Attributes:
        windows: the window of each layer, None for full attention.
        kv_heads: KV heads of one device.
        number_bytes: bytes of an element of the cache.
        phase: whose tokens have the window in this plugin; stock vLLM has no phases.
        num_stages: pipeline stages that the layers are divided among.
        layer_partition: the value of ``VLLM_PP_LAYER_PARTITION``, by which they are; None where it
            is unset.
        linear: the layers with linear attention, whose windows are None too.
    """

    windows: tuple[int | None, ...]
    sink_tokens: int
    kv_heads: int
    head_dim: int
    number_bytes: int
    phase: Phase = Phase.BOTH
    num_stages: int = 1
    layer_partition: str | None = None
    linear: frozenset[int] = frozenset()

    @property
    def stages(self) -> tuple[range, ...]:
        """Layers of each pipeline stage."""
        return stages_of(len(self.windows), self.num_stages, self.layer_partition)

    def groups(self, arm: Arm, limits: Limits, num_prompt: int | None = None) -> list[KVGroups]:
        """Make the KV groups of an arm; see :func:`kv_groups_of`."""
        return kv_groups_of(
            arm, self.windows, self.sink_tokens, limits, self.phase, num_prompt, self.linear
        )

    def layer_page_bytes(self, page_size: int) -> int:
        """Count the bytes of one layer's keys and values in a page."""
        return page_size * self.kv_heads * 2 * self.head_dim * self.number_bytes


@dataclass(frozen=True)
class Pool:
    """The pool of one arm's engine.

    Attributes:
        page_bytes: bytes of a page in all layers of a group, padding included, on a device of the
            stage that has the most of them.
        token_bytes: bytes that a token of a prompt adds to a long text, on average.
        promised_pages: pages that admission reserves for a request of ``max_model_len``.
        num_pages: pages of the pool; None where its memory is not known.
        estimate: requests of ``max_model_len``, as vLLM's start-up line says.
        longest: longest ``max_model_len`` that the engine starts with, up to the one asked for.
    """

    groups: tuple[KVGroups, ...]
    page_bytes: int
    token_bytes: int
    promised_pages: int
    num_pages: int | None = None
    estimate: float | None = None
    longest: int | None = None

    def starts(self, limits: Limits) -> bool:
        """Say whether vLLM would start the engine."""
        return self.longest == limits.max_model_len

    def to_json(self) -> dict[str, Any]:
        groups = [
            {
                "kind": _kind_of_groups(group),
                "num_groups": group.num_groups,
                "num_layers": group.num_layers,
                "num_padding": group.num_padding,
                "admission_cap_pages": group.policy.cap,
            }
            for group in self.groups
        ]
        return {**asdict(replace(self, groups=())), "groups": groups}


@dataclass(frozen=True)
class Need:
    """The pages that requests of one size take.

    Attributes:
        peak_pages: most that one holds in its life.
        last_pages: what it holds at its last token.
        peak_bytes: ``peak_pages`` in bytes.
        running: requests that run at once while more wait; None where no engine starts.
    """

    peak_pages: int
    last_pages: int
    peak_bytes: int
    running: float | None


def plan_pool(arm: Arm, model: Model, limits: Limits, memory: int | None) -> Pool:
    """Plan the pool of an arm in ``memory`` bytes of each device; None leaves its size open."""
    groups = model.groups(arm, limits)
    # The stage with the fewest pages decides for all.
    group_layers = max(group.most_layers(stage) for group in groups for stage in model.stages)
    page_bytes = group_layers * model.layer_page_bytes(limits.block_size)
    num_growing = sum(
        group.num_groups
        for group in groups
        if group.policy.window is None
        or (arm is Arm.SWA and model.phase is Phase.DECODE and not group.is_linear)
    )
    pool = Pool(
        groups=tuple(groups),
        page_bytes=page_bytes,
        token_bytes=num_growing * page_bytes // limits.block_size,
        promised_pages=_pool_pages_promised(groups, limits),
    )
    if memory is None:
        return pool
    num_pages = memory // page_bytes

    def starts(max_model_len: int) -> bool:
        shorter = replace(limits, max_model_len=max_model_len)
        promised = _pool_pages_promised(model.groups(arm, shorter), shorter)
        return promised <= num_pages - 1  # vLLM never gives out the first page

    return replace(
        pool,
        num_pages=num_pages,
        estimate=num_pages / pool.promised_pages,
        longest=_largest_that_holds(starts, limits.max_model_len),
    )


def need_in_pool(arm: Arm, model: Model, pool: Pool, limits: Limits, workload: Workload) -> Need:
    """Plan what requests of ``workload`` take of the pool of an arm."""
    groups = model.groups(arm, limits, workload.num_prompt)
    peak, last = queue_pages_of_one_request(groups, limits, workload)
    running = None
    if pool.num_pages is not None and pool.starts(limits):
        running = running_at_once(groups, pool.num_pages, limits, workload)
    return Need(peak, last, peak * pool.page_bytes, running)


def _kind_of_groups(group: KVGroups) -> str:
    if group.is_linear:
        return "linear"
    return "full" if group.policy.window is None else "sliding"


def _pool_pages_promised(groups: Sequence[KVGroups], limits: Limits) -> int:
    total = 0
    for group in groups:
        cap, entries = group.policy.cap, ceil_div(limits.max_model_len, limits.block_size)
        total += group.num_groups * (entries if cap is None else cap)
    return total


def _largest_that_holds(holds: Callable[[int], bool], most: int) -> int:
    """Find the largest number up to ``most`` for which a monotonic property holds, or 0."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if holds(middle):
            least = middle
        else:
            most = middle - 1
    return least
