"""Cases of the kernels, in Triton's interpreter or on a GPU, against the fp64 oracle.

Everything that a kernel must not use is poisoned: slots outside the visible set and all scratch
hold NaN, table entries of pages without a visible key name a page far outside the cache, and the
guard stops every other stray access.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swa_backend import reference
from swa_backend.window import Phase, is_visible
from tests.helpers.kernels.guard import DEVICE, IS_WATCHED, Guard, guarded

BAD_PAGE = 2**30
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Of queries, and of the cache where it has another.
DTYPES: list[tuple[torch.dtype, torch.dtype | None]] = [
    *((dtype, None) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *itertools.product((torch.float32, torch.float16, torch.bfloat16), FP8),
]
# Largest relative error of rounding: to the nearest, except that the interpreter cuts off what
# bfloat16 cannot hold.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# Scores, exponentials and sums are fp32 whatever the dtype, each a few roundings deep.
FP32_SLACK = 2.0**-18


@dataclass(frozen=True)
class DecodeCase:
    """One call of ``decode_attention``.

    Attributes:
        seq_lens: tokens of each request, its queries included.
        num_queries: queries of each request; None for one each, without ``query_start_loc``.
        by_token: whether the heads of a token lie together, or the tokens of a head.
        is_far: whether the cache is so large that its offsets do not fit in 32 bits.
        num_padding: queries behind the last request's.
        prompt_lens: tokens of each request's prompt, in a phase that asks for them.
    """

    window: int | None
    seq_lens: tuple[int, ...]
    page: int = 16
    sink_tokens: int = 0
    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    num_queries: tuple[int, ...] | None = None
    is_shifted: bool = False
    by_token: bool = False
    is_far: bool = False
    num_padding: int = 0
    phase: Phase = Phase.BOTH
    prompt_lens: tuple[int, ...] = ()

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k, None))
        return " ".join(changed).replace("torch.", "").replace(", ", ",")

    @property
    def num_tokens(self) -> int:
        return sum(self.num_queries or (1,) * len(self.seq_lens)) + self.num_padding

    def visible(self, request: int) -> list[int]:
        """Positions that a query of the request sees."""
        seq_len = self.seq_lens[request]
        num_queries = 1 if self.num_queries is None else self.num_queries[request]
        lowest = max(0, seq_len - num_queries - (self.window or seq_len) - 1)
        by_prompt = self.phase, self.prompt_lens[request] if self.prompt_lens else 0
        near = {*range(lowest, seq_len), *range(min(self.sink_tokens, seq_len))}
        if self.phase is not Phase.BOTH:
            near = {*range(seq_len)}
        queries = range(max(0, seq_len - num_queries), seq_len)
        return sorted(
            k
            for k in near
            if any(is_visible(q, k, self.window, self.sink_tokens, *by_prompt) for q in queries)
        )


@dataclass(frozen=True)
class DecodeInputs:
    """Tensors of a case, and how many bytes of keys and values its queries see."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, Any]
    is_live: torch.Tensor
    tolerance: float
    num_kv_bytes: int


def make_inputs(case: DecodeCase, directory: Path) -> DecodeInputs:
    """Random tensors of ``case``, poisoned where no query looks."""
    generator = torch.Generator().manual_seed(7)
    kv_dtype = case.kv_dtype or case.dtype
    visible = [case.visible(r) for r in range(len(case.seq_lens))]
    kv_cache, table, largest = make_pages(
        case, kv_dtype, visible, max(case.seq_lens), directory, generator
    )
    query_shape = (case.num_tokens, case.num_kv_heads * case.group, case.head_dim)
    query, shifted = torch.randn(2, *query_shape, generator=generator).to(DEVICE, case.dtype)
    start_loc = None
    if case.num_queries is not None:
        start_loc = torch.tensor([0, *case.num_queries]).cumsum(0).int().to(DEVICE)
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv_dtype in FP8 else {}
    return DecodeInputs(
        args=(query, kv_cache, table, torch.tensor(case.seq_lens).int().to(DEVICE)),
        kwargs={
            "window": case.window,
            "sink_tokens": case.sink_tokens,
            "sink_query": shifted if case.is_shifted else None,
            "query_start_loc": start_loc,
            "phase": case.phase,
            "prompt_lens": prompt_lens_of(case),
            **scales,
        },
        is_live=table != BAD_PAGE,
        tolerance=largest * scales.get("v_scale", 1.0) * _relative_error(case.dtype, kv_dtype),
        num_kv_bytes=sum(map(len, visible))
        * (case.num_kv_heads * 2 * case.head_dim * kv_cache.element_size()),
    )


def prompt_lens_of(case: Any) -> torch.Tensor | None:
    """The operand int32 ``[num_reqs]`` of a case in a phase."""
    if case.phase is Phase.BOTH:
        return None
    return torch.tensor(case.prompt_lens).int().to(DEVICE)


def _relative_error(dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
    """Largest error of an output, relative to the largest value: of the weights, and its own."""
    dot = torch.float32
    if dtype is torch.float16 or (dtype is torch.bfloat16 and kv_dtype in FP8):
        dot = torch.float16
    return ROUNDING[dot] + ROUNDING[dtype] + FP32_SLACK


def make_pages(
    case: Any,
    dtype: torch.dtype,
    visible: Sequence[Sequence[int]],
    longest: int,
    directory: Path,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A cache and a block table with random numbers where keys are visible, and poison elsewhere.

    Args:
        visible: positions of each request that are read from pages.
        longest: tokens that the table has entries for.

    Returns:
        The cache, the table int32 ``[num_reqs, max_pages]``, and the largest number.
    """
    pages = [sorted({k // case.page for k in keys}) for keys in visible]
    num_used = sum(map(len, pages))
    kv_cache, first_page = make_cache(case, dtype, num_used + 3, directory)
    ids = torch.randperm(num_used + 3, generator=generator)
    live = kv_cache[first_page:].cpu()
    live[ids] = torch.full((), float("nan")).to(dtype)
    table = torch.full((len(visible), max(1, -(-longest // case.page))), BAD_PAGE)
    largest, used = 0.0, iter(ids.tolist())
    for request, keys in enumerate(visible):
        own = torch.tensor([next(used) for _ in pages[request]]).long()
        table[request, pages[request]] = first_page + own
        positions = torch.tensor(keys, dtype=torch.long)
        shape = (len(keys), case.num_kv_heads, 2 * case.head_dim)
        rows = torch.randn(shape, generator=generator).to(dtype)
        live[table[request, positions // case.page] - first_page, :, positions % case.page] = rows
        largest = max(largest, float(rows.float().abs().max()) if keys else 0.0)
    kv_cache[first_page:].copy_(live)  # on the CPU they are the same
    return kv_cache, table.int().to(DEVICE), largest


def make_cache(
    case: Any, dtype: torch.dtype, num_pages: int, directory: Path
) -> tuple[torch.Tensor, int]:
    """A cache, and the first of ``num_pages`` pages at its end, which alone may be used."""
    heads_and_slots = (case.num_kv_heads, case.page)
    shape = heads_and_slots[::-1] if case.by_token else heads_and_slots
    per_page = case.num_kv_heads * case.page * 2 * case.head_dim
    first = 2**31 // per_page + 1 if case.is_far else 0
    count = (first + num_pages) * per_page
    if case.is_far and DEVICE.type == "cpu":
        # A file with a hole: several gigabytes of addresses, a few pages on the disk.
        file = directory / "cache"
        flat = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
        file.unlink()
    else:
        flat = torch.empty(count, dtype=dtype, device=DEVICE)
    cache = flat.view(-1, *shape, 2 * case.head_dim)
    return cache.transpose(1, 2) if case.by_token else cache, first


@contextmanager
def watched_scratch(
    ops: ModuleType, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Scratch of the operations holds NaN when they get it, and kernels may touch it."""
    decode = sys.modules[ops.decode_attention.__module__]
    allocate = decode._divide_scratch

    def scratch(*args: Any) -> Any:
        tensors = allocate(*args)
        for tensor in filter(torch.is_tensor, tensors):
            guard.watch("scratch", tensor.fill_(float("nan")))
        return tensors

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_divide_scratch", scratch)
        yield


def check_decode(
    case: DecodeCase, ops: ModuleType, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Assert that the kernels agree with the oracle, and read each visible key once and no more."""
    inputs = make_inputs(case, directory)
    query, kv_cache, table, _ = inputs.args
    expected = reference.decode_attention(query.double(), *inputs.args[1:], **_in_fp64(inputs))
    out = torch.full_like(query, float("nan"))
    with guarded(monkeypatch) as guard, watched_scratch(ops, guard, monkeypatch):
        guard.watch("table", table, allowed=inputs.is_live)
        guard.watch("kv_cache", kv_cache)
        for tensor in (query, out, inputs.args[3], *inputs.kwargs.values()):
            if isinstance(tensor, torch.Tensor):
                guard.watch("other", tensor)
        ops.decode_attention(*inputs.args, **inputs.kwargs, out=out, impl="triton")
    num_bytes = guard.bytes_touched["kv_cache"]
    if not IS_WATCHED:
        assert num_bytes == 0
    elif case.num_queries is None:
        assert num_bytes == inputs.num_kv_bytes
    else:  # queries of a request share what they read, as far as they lie in one block
        assert inputs.num_kv_bytes <= num_bytes < max(case.num_queries) * inputs.num_kv_bytes
    assert float((out.double() - expected).abs().max()) <= inputs.tolerance


def _in_fp64(inputs: DecodeInputs) -> dict[str, Any]:
    shifted = inputs.kwargs["sink_query"]
    return {**inputs.kwargs, "sink_query": None if shifted is None else shifted.double()}


@dataclass(frozen=True)
class WriteCase:
    """One call of ``write_pages``."""

    slots: tuple[int, ...]
    page: int = 16
    num_kv_heads: int = 3
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    by_token: bool = False
    is_far: bool = False
    num_padding: int = 0

    __str__ = DecodeCase.__str__


def check_write(
    case: WriteCase, ops: ModuleType, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Assert that the kernel stores what the oracle stores, bit for bit, and nothing else."""
    generator = torch.Generator().manual_seed(7)
    shape = (len(case.slots) + case.num_padding, case.num_kv_heads, case.head_dim)
    # The factor takes some numbers beyond what fp8 holds, and some below what it tells from zero.
    scatter = torch.exp(4 * torch.randn(shape, generator=generator))
    key, value = (torch.randn(2, *shape, generator=generator) * scatter).to(case.dtype)
    key[0, 0, 0] = float("nan")
    scales = {"k_scale": 0.75, "v_scale": 1.5} if case.kv_dtype else {}
    kv_dtype = case.kv_dtype or case.dtype
    num_pages = max(case.slots) // case.page + 2
    cache, first = make_cache(case, kv_dtype, num_pages, directory)
    live = cache[first:]
    live.view(torch.uint8).fill_(7)
    expected = live.cpu().clone()
    slots = torch.tensor(case.slots)
    reference.write_pages(key, value, expected, slots, **scales)
    slots = torch.where(slots < 0, slots, slots + first * case.page).to(DEVICE)
    key, value = key.to(DEVICE), value.to(DEVICE)
    with guarded(monkeypatch) as guard:
        for name, tensor in {"cache": live, "slots": slots, "key": key, "value": value}.items():
            guard.watch(name, tensor)
        ops.write_pages(key, value, cache, slots, **scales, impl="triton")
    assert torch.equal(live.cpu().view(torch.uint8), expected.view(torch.uint8))
