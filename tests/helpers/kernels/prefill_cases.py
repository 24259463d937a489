"""Cases of the prefill kernel, poisoned and watched as those of the other kernels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swa_backend import reference
from swa_backend.window import Phase, first_visible, is_visible, num_pinned
from tests.helpers.kernels.cases import (
    BAD_PAGE,
    FP8,
    FP32_SLACK,
    ROUNDING,
    DecodeCase,
    make_pages,
    prompt_lens_of,
)
from tests.helpers.kernels.guard import DEVICE, IS_WATCHED, guarded

NAN = float("nan")
# Rows of a query block in the interpreter.
ROWS = 128


@dataclass(frozen=True)
class PrefillCase:
    """One call of ``prefill_attention``.

    Attributes:
        chunks: of each request, tokens before its queries, and queries; ``(-n, n)`` is a padded
            row of ``n`` queries.
        num_padding: queries behind the last request's.
        prompt_lens: tokens of each request's prompt, in a phase that asks for them.
    """

    window: int | None
    chunks: tuple[tuple[int, int], ...]
    page: int = 16
    sink_tokens: int = 0
    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    is_shifted: bool = False
    by_token: bool = False
    is_far: bool = False
    num_padding: int = 0
    phase: Phase = Phase.BOTH
    prompt_lens: tuple[int, ...] = ()

    __str__ = DecodeCase.__str__

    @property
    def starts(self) -> list[int]:
        """First token of each request, and the one behind the last."""
        return [0, *torch.tensor([n for _, n in self.chunks]).cumsum(0).tolist()]

    def seen(self, request: int, queries: range) -> Iterator[set[int]]:
        """Keys that queries at these positions see: those in their windows, then those below."""
        window, low = self.window, 0
        by_prompt = self.phase, self.prompt_lens[request] if self.prompt_lens else 0
        if window is not None and self.phase is Phase.BOTH:
            low = max(0, queries.start - window)
        firsts = {q: first_visible(q, window, *by_prompt) for q in queries}
        yield {k for q in queries for k in range(max(low, firsts[q]), q + 1)}
        pinned = range(min(num_pinned(self.sink_tokens, *by_prompt), queries.stop))
        yield {
            k
            for q in queries
            for k in pinned
            if is_visible(q, k, window, self.sink_tokens, *by_prompt) and k < firsts[q]
        }

    def keys_read(self) -> tuple[int, int]:
        """Cached and own keys that the blocks read, each block those that its queries see."""
        cached = own = 0
        for request, (context, num_queries) in enumerate(self.chunks):
            step = ROWS // self.group
            for first in range(0, num_queries if context >= 0 else 0, step):
                stop = context + min(num_queries, first + step)
                for keys in self.seen(request, range(context + first, stop)):
                    cached += sum(key < context for key in keys)
                    own += sum(key >= context for key in keys)
        return cached, own


@dataclass(frozen=True)
class PrefillInputs:
    """Tensors of a case; of ``args`` query, key, value, cache, table, starts and lengths."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, Any]
    tolerance: float


def make_inputs(case: PrefillCase, directory: Path) -> PrefillInputs:
    """Random tensors of ``case``, poisoned where no query looks."""
    generator = torch.Generator().manual_seed(7)
    kv_dtype, starts = case.kv_dtype or case.dtype, case.starts
    visible = [
        sorted(
            {k for keys in case.seen(i, range(context, context + n)) for k in keys if k < context}
        )
        for i, (context, n) in enumerate(case.chunks)
    ]
    longest = max(context + n for context, n in case.chunks)
    kv_cache, table, largest = make_pages(case, kv_dtype, visible, longest, directory, generator)
    shape = (starts[-1] + case.num_padding, case.num_kv_heads, case.head_dim)
    query_shape = (shape[0], case.num_kv_heads * case.group, case.head_dim)
    query, shifted = torch.randn(2, *query_shape, generator=generator).to(DEVICE, case.dtype)
    key, value = torch.randn(2, *shape, generator=generator).to(DEVICE, case.dtype)
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv_dtype in FP8 else {}
    largest = max(largest * scales.get("v_scale", 1.0), float(value.float().abs().max()))
    for request, (context, _) in enumerate(case.chunks):
        if context < 0:
            key[starts[request] : starts[request + 1]] = NAN
    for tensor in (query, shifted, key, value):
        tensor[starts[-1] :] = NAN
    dot = torch.float16 if case.dtype is torch.float16 else torch.float32
    return PrefillInputs(
        args=(
            *(query, key, value, kv_cache, table, torch.tensor(starts).int().to(DEVICE)),
            torch.tensor([context + n for context, n in case.chunks]).int().to(DEVICE),
        ),
        kwargs={
            "window": case.window,
            "sink_tokens": case.sink_tokens,
            "sink_query": shifted if case.is_shifted else None,
            "phase": case.phase,
            "prompt_lens": prompt_lens_of(case),
            **scales,
        },
        tolerance=largest * (ROUNDING[dot] + ROUNDING[case.dtype] + FP32_SLACK),
    )


def check_prefill(
    case: PrefillCase, ops: ModuleType, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Assert that the kernel agrees with the oracle, and that a block reads no key that it does
    not see, and none twice."""
    inputs = make_inputs(case, directory)
    query, key, value, kv_cache, table, *_ = inputs.args
    exact = {
        k: v.double() if k == "sink_query" and case.is_shifted else v
        for k, v in inputs.kwargs.items()
    }
    expected = reference.prefill_attention(query.double(), *inputs.args[1:], **exact)
    out = torch.full_like(query, NAN)
    with guarded(monkeypatch) as guard:
        guard.watch("table", table, allowed=table != BAD_PAGE)
        guard.watch("kv_cache", kv_cache)
        guard.watch("own", key)
        guard.watch("own", value)
        for tensor in (query, out, *inputs.args[5:], *inputs.kwargs.values()):
            if isinstance(tensor, torch.Tensor):
                guard.watch("other", tensor)
        ops.prefill_attention(*inputs.args, **inputs.kwargs, out=out, impl="triton")
    if IS_WATCHED:
        per_key = case.num_kv_heads * 2 * case.head_dim
        cached, own = case.keys_read()
        assert guard.bytes_touched["kv_cache"] == cached * per_key * kv_cache.element_size()
        assert guard.bytes_touched["own"] == own * per_key * key.element_size()
    assert float((out.double() - expected).abs().max()) <= inputs.tolerance
