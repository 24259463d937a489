"""Decode attention timed against others on the same batches, and the targets that decide."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swa_backend import ops
from swa_backend.pages import ceil_div
from swa_vllm.tools.kernel_rivals import OURS, Batch, Call

Clock = Callable[[Sequence[Call]], float]
PAGE = 16
HEAD_DIM = 128
# Several times any L2 cache: a layer finds its keys cold, for the other layers ran in between.
_COLD_BYTES = 512 << 20
# Of an output, relative to the largest value: bfloat16 weights and bfloat16 output.
_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Case:
    """Decoding requests of equal length in one layer of Qwen3."""

    window: int
    seq_len: int
    batch: int
    kv_dtype: torch.dtype
    num_kv_heads: int = 8
    group: int = 4

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that the queries see: the least that can be read."""
        rows = self.batch * min(self.window, self.seq_len) * self.num_kv_heads
        return rows * 2 * HEAD_DIM * self.kv_dtype.itemsize


@dataclass(frozen=True)
class Result:
    """Microseconds of a case by name, or why there are none."""

    case: Case
    times: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def bandwidth(self, name: str) -> float:
        """GB/s of the least that can be read."""
        return self.case.num_bytes / self.times[name] / 1e3


def make_batch(case: Case, device: torch.device, cold_bytes: int = _COLD_BYTES) -> Batch:
    """Random tensors; block tables with so many different pages that no cache holds them."""
    generator = torch.Generator(device).manual_seed(0)
    first_page = max(0, case.seq_len - case.window) // PAGE
    max_pages = ceil_div(case.seq_len, PAGE)
    num_live = case.batch * (max_pages - first_page)
    num_tables = max(1, ceil_div(cold_bytes, case.num_bytes))
    num_pages = 1 + num_tables * num_live
    shape = (num_pages, case.num_kv_heads, PAGE, 2 * HEAD_DIM)
    cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    cache.normal_(generator=generator)
    order = 1 + torch.randperm(num_pages - 1, generator=generator, device=device).int()
    tables = []
    for pages in order.view(num_tables, case.batch, -1):
        tables.append(torch.zeros(case.batch, max_pages, dtype=torch.int32, device=device))
        tables[-1][:, first_page:] = pages
    query = torch.empty(case.batch, case.num_kv_heads * case.group, HEAD_DIM, device=device)
    query.normal_(generator=generator)
    return Batch(
        query=query.bfloat16(),
        kv_cache=cache.to(case.kv_dtype),
        tables=tables,
        seq_lens=torch.full((case.batch,), case.seq_len, dtype=torch.int32, device=device),
        seq_len=case.seq_len,
        window=case.window,
    )


def measure(
    case: Case, batch: Batch, rivals: Mapping[str, Callable[[Batch], list[Call]]], clock: Clock
) -> Result:
    """Times of those that give the oracle's output.

    Raises:
        RuntimeError: this project's own output is wrong.
    """
    expected = ops.decode_attention(
        batch.query,
        batch.kv_cache,
        batch.tables[0],
        batch.seq_lens,
        window=batch.window,
        impl="torch",
    ).float()
    bound = _TOLERANCE * float(batch.kv_cache.float().abs().max())
    result = Result(case)
    for name, prepare in rivals.items():
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


def copy_bandwidth(device: torch.device, clock: Clock, num_bytes: int = 1 << 30) -> float:
    """GB/s that a copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock([lambda: target.copy_(source)]) / 1e3


def targets(results: Sequence[Result], copied: float) -> list[dict[str, Any]]:
    """The figures that decide: what is wanted, the worst measured, whether it was met.

    ``worst`` and ``met`` are None where nothing was measured.
    """
    times = {r.case: r.times for r in results}
    single = [r for r in results if r.case.batch == 1]

    def latency(windows: Callable[[int], bool]) -> list[float]:
        return [r.times[OURS] for r in single if windows(r.case.window)]

    def against(rival: str, chosen: Sequence[Result]) -> list[float]:
        return [r.times[OURS] / r.times[rival] for r in chosen if rival in r.times]

    growth = []
    for case, own in times.items():
        shorter = replace(case, seq_len=8192)
        if case.seq_len == 131072 and shorter in times:
            growth.append(own[OURS] / times[shorter][OURS])
    many = [r.bandwidth(OURS) / copied for r in results if r.case.batch == 64]
    long = [r for r in single if r.case.seq_len >= 32768]
    return [
        _at_most("us at batch 1, W <= 1024", 8.0, latency(lambda window: window <= 1024)),
        _at_most("us at batch 1, W = 4096", 14.0, latency(lambda window: window == 4096)),
        _at_least("of copy bandwidth at batch 64", 0.85, many),
        _at_most("time at 128k tokens / at 8k", 1.05, growth),
        _at_most("time / TRITON_ATTN's, batch 1, n >= 32k", 0.5, against("TRITON_ATTN", long)),
        _at_most("time / FLASH_ATTN's", 1.05, against("FLASH_ATTN", results)),
    ]


def _at_most(what: str, limit: float, measured: Sequence[float]) -> dict[str, Any]:
    worst = max(measured, default=None)
    met = None if worst is None else worst <= limit
    return {"target": f"{what}: at most {limit}", "worst": worst, "met": met}


def _at_least(what: str, limit: float, measured: Sequence[float]) -> dict[str, Any]:
    worst = min(measured, default=None)
    met = None if worst is None else worst >= limit and math.isfinite(worst)
    return {"target": f"{what}: at least {limit}", "worst": worst, "met": met}
