"""Arms of attention timed on the same batches, and the targets that the times are held to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swa_backend import reference
from swa_backend.pages import ceil_div
from swa_backend.window import first_visible, num_visible
from swa_vllm.tools.bench.attention.arms import OURS, Batch, Call, our_kernels

Clock = Callable[[Sequence[Call]], float]
PAGE = 16
HEAD_DIM = 128
# Of an output, relative to the largest value: bfloat16 weights and bfloat16 output.
_TOLERANCE = 2.0**-7
# Queries of a chunk whose output is checked at once.
_CHECKED_TOGETHER = 512


@dataclass(frozen=True)
class AttentionCase:
    """Requests of equal length in one layer of Qwen3: decoding ones, or prefill chunks.

    Attributes:
        seq_len: tokens, including the queries.
        num_queries: queries of each request; 1 decodes.
        dtype: dtype of queries and of a chunk's own keys and values.
    """

    window: int
    seq_len: int
    batch: int
    kv_dtype: torch.dtype
    num_kv_heads: int = 8
    group: int = 4
    num_queries: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def first_key(self) -> int:
        """The first key that a query sees."""
        return first_visible(self.seq_len - self.num_queries, self.window)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that the queries see: the least that can be read."""
        rows = self.batch * (self.seq_len - self.first_key) * self.num_kv_heads
        return rows * 2 * HEAD_DIM * self.kv_dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Operations of both products of the queries with what they see."""
        positions = range(self.seq_len - self.num_queries, self.seq_len)
        visible = sum(num_visible(position, self.window) for position in positions)
        return 4 * HEAD_DIM * self.batch * self.num_kv_heads * self.group * visible


@dataclass(frozen=True)
class Result:
    """Microseconds of a case by arm, or why an arm was not timed."""

    case: AttentionCase
    times: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def bandwidth(self, name: str) -> float:
        """GB/s at which an arm reads the least that can be read."""
        return self.case.num_bytes / self.times[name] / 1e3

    def speed(self, name: str) -> float:
        """TFLOP/s at which an arm computes the least that can be computed."""
        return self.case.num_flops / self.times[name] / 1e6


def make_kernel_batch(case: AttentionCase, device: torch.device, cold_bytes: int) -> Batch:
    """Make random tensors, and block tables whose different pages hold ``cold_bytes`` or more.

    With several times what a GPU's caches hold, a call finds its keys cold, as behind other layers.
    """
    generator = torch.Generator(device).manual_seed(0)
    first_page = case.first_key // PAGE
    max_pages = ceil_div(case.seq_len, PAGE)
    num_live = case.batch * (max_pages - first_page)
    num_tables = max(1, ceil_div(cold_bytes, case.num_bytes))
    num_pages = 1 + num_tables * num_live
    shape = (num_pages, case.num_kv_heads, PAGE, 2 * HEAD_DIM)
    cache = torch.empty(shape, dtype=case.dtype, device=device)
    cache.normal_(generator=generator)
    order = 1 + torch.randperm(num_pages - 1, generator=generator, device=device).int()
    tables = []
    for pages in order.view(num_tables, case.batch, -1):
        tables.append(torch.zeros(case.batch, max_pages, dtype=torch.int32, device=device))
        tables[-1][:, first_page:] = pages
    num_tokens = case.batch * case.num_queries
    query = torch.empty(num_tokens, case.num_kv_heads * case.group, HEAD_DIM, device=device)
    query.normal_(generator=generator)
    cache = cache.to(case.kv_dtype)
    own = torch.arange(case.seq_len - case.num_queries, case.seq_len, device=device)
    # What the cache holds: here a chunk's own keys are not read from it, elsewhere they are.
    rows = cache[tables[0][:, own // PAGE].long(), :, own % PAGE].to(case.dtype)
    key, value = rows.view(num_tokens, case.num_kv_heads, 2 * HEAD_DIM).chunk(2, dim=-1)
    return Batch(
        query=query.to(case.dtype),
        key=key,
        value=value,
        kv_cache=cache,
        tables=tables,
        seq_lens=torch.full((case.batch,), case.seq_len, dtype=torch.int32, device=device),
        seq_len=case.seq_len,
        window=case.window,
    )


def time_kernel_arms(
    case: AttentionCase,
    batch: Batch,
    arms: Mapping[str, Callable[[Batch], list[Call]]],
    clock: Clock,
) -> Result:
    """Time the arms that give the oracle's output.

    Raises:
        RuntimeError: this project's own output is wrong.
    """
    expected = _oracle_of_timed_batch(batch).float()
    bound = _TOLERANCE * float(batch.kv_cache.float().abs().max())
    result = Result(case)
    for name, prepare in arms.items():
        try:
            calls = prepare(batch)
            error = float((calls[0]().float() - expected).abs().max())
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as reason:
            if name == OURS:
                raise
            result.refused[name] = str(reason).strip().split("\n")[0][:80]
            continue
        if not error <= bound:
            if name == OURS:
                raise RuntimeError(f"{case}: off by {error:.3g}, allowed is {bound:.3g}")
            result.refused[name] = f"wrong: off by {error:.3g}"
            continue
        result.times[name] = clock(calls)
    return result


def _oracle_of_timed_batch(batch: Batch) -> torch.Tensor:
    """Compute the oracle's output; of chunks in fp64, one block of queries after the other."""
    if batch.num_queries == 1:
        return our_kernels(batch, impl="torch")[0]()
    page, device = batch.kv_cache.shape[2], batch.query.device
    outputs = []
    chunks = batch.query.view(len(batch.seq_lens), batch.num_queries, *batch.query.shape[1:])
    for table, chunk in zip(batch.tables[0], chunks.double(), strict=True):
        for first in range(0, batch.num_queries, _CHECKED_TOGETHER):
            query = chunk[first : first + _CHECKED_TOGETHER]
            start = batch.seq_len - batch.num_queries + first
            stop = start + len(query)
            keys = torch.arange(first_visible(start, batch.window), stop, device=device)
            rows = batch.kv_cache[table[keys // page].long(), :, keys % page]
            key, value = rows.double().transpose(0, 1).chunk(2, dim=-1)
            mask = reference.reference_mask(keys[-len(query) :], keys, batch.window)
            outputs.append(reference.attention(query.transpose(0, 1), key, value, mask))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def copy_bandwidth(device: torch.device, clock: Clock, num_bytes: int) -> float:
    """Measure the GB/s that a copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock([lambda: target.copy_(source)]) / 1e3


def judge_targets(results: Sequence[Result], copied: float) -> list[dict[str, Any]]:
    """Compare the times with their targets: what is wanted, the worst measured, whether it was met.

    ``worst`` and ``met`` are None where nothing was measured. All are of decoding.
    """
    results = [r for r in results if r.case.num_queries == 1]
    times = {r.case: r.times for r in results}
    single = [r for r in results if r.case.batch == 1]

    def latency(windows: Callable[[int], bool]) -> list[float]:
        return [r.times[OURS] for r in single if windows(r.case.window)]

    def against(arm: str, chosen: Sequence[Result]) -> list[float]:
        return [r.times[OURS] / r.times[arm] for r in chosen if arm in r.times]

    growth = []
    for case, own in times.items():
        shorter = replace(case, seq_len=8192)
        if case.seq_len == 131072 and shorter in times:
            growth.append(own[OURS] / times[shorter][OURS])
    many = [r.bandwidth(OURS) / copied for r in results if r.case.batch == 64]
    long = [r for r in single if r.case.seq_len >= 32768]
    return [
        _target_at_most("us at batch 1, W <= 1024", 8.0, latency(lambda window: window <= 1024)),
        _target_at_most("us at batch 1, W = 4096", 14.0, latency(lambda window: window == 4096)),
        _target_at_least("of copy bandwidth at batch 64", 0.85, many),
        _target_at_most("time at 128k tokens / at 8k", 1.05, growth),
        _target_at_most(
            "time / TRITON_ATTN's, batch 1, n >= 32k", 0.5, against("TRITON_ATTN", long)
        ),
        _target_at_most("time / FLASH_ATTN's", 1.05, against("FLASH_ATTN", results)),
    ]


def _target_at_most(what: str, limit: float, measured: Sequence[float]) -> dict[str, Any]:
    worst = max(measured, default=None)
    met = None if worst is None else worst <= limit
    return {"target": f"{what}: at most {limit}", "worst": worst, "met": met}


def _target_at_least(what: str, limit: float, measured: Sequence[float]) -> dict[str, Any]:
    worst = min(measured, default=None)
    met = None if worst is None else worst >= limit and math.isfinite(worst)
    return {"target": f"{what}: at least {limit}", "worst": worst, "met": met}
