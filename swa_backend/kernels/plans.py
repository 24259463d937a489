"""Launch plans: tiles, splits and dtypes of a kernel on a device (imports no triton, no torch).

The launch depends on shapes and the device only, never on lengths or table entries, so a captured
CUDA graph stays right. The ahead-of-time gate compiles what these plans say.
"""

from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any

from swa_backend.pages import ceil_div
from swa_backend.window import Phase

# Programs that fit on a multiprocessor, by the table of the ahead-of-time gate.
_PROGRAMS_PER_PROCESSOR = 4
# Compute capability whose tiles were chosen by measured times (H100).
_TIMED = 90
# With more splits, the merge would read as much as they save.
_MAX_SPLITS = 32
# Rows of the smallest matrix product of the tensor cores.
_MIN_ROWS = 16
# Rows of a prefill block, each of which uses every key that is loaded; and fewer of them where
# products take their operands from registers and more rows would spill.
_PREFILL_ROWS = 128
_FEWER_PREFILL_ROWS = 64
# Compute capabilities whose products read operands from shared memory (wgmma, tcgen05).
_PRODUCTS_FROM_SHARED = (90, 100, 103)
# Compute capabilities with about 100 KB of shared memory, where deeper pipelines do not fit twice.
_SMALL_SHARED_MEMORY = (86, 89, 120)
# Registers a thread, so that four programs of four warps fit on a multiprocessor.
_MAX_REGISTERS = 128
# Compute capabilities where ptxas spills rather than take more than 72.
_SPILLS_EARLY = (100, 103)


class NumberFormat(StrEnum):
    """Format of the elements of queries, caches and products, by Triton's names."""

    FLOAT32 = "fp32"
    FLOAT16 = "fp16"
    BFLOAT16 = "bf16"
    E4M3 = "fp8e4nv"
    E5M2 = "fp8e5"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return {"fp32": 4, "fp16": 2, "bf16": 2}.get(self.value, 1)


@dataclass(frozen=True)
class Target:
    """A device that kernels are compiled for.

    Attributes:
        backend: ``"cuda"``, ``"hip"``, or ``"cpu"`` for Triton's interpreter.
        arch: compute capability (90 is 9.0), or ``"gfx942"`` and the like; 0 for the interpreter.
        num_processors: multiprocessors or compute units.

    Raises:
        ValueError: an NVIDIA device below compute capability 8.0.
    """

    backend: str
    arch: int | str
    num_processors: int

    def __post_init__(self) -> None:
        if self.backend == "cuda" and int(self.arch) < 80:
            raise ValueError(
                f"sm_{self.arch} (compute capability {int(self.arch) / 10}) lacks bfloat16 and "
                'asynchronous copies; the kernels need sm_80 or newer: use impl="torch"'
            )

    @property
    def reads_e4m3(self) -> bool:
        """Whether the device converts from e4m3; elsewhere the kernels shift its bits."""
        return self.backend == "cuda" and int(self.arch) >= 89

    def options(self) -> dict[str, Any]:
        """Compiler options of every kernel."""
        # Fusion is explicit because its default differs between Triton's versions and backends.
        return {"num_warps": 4, "enable_fp_fusion": True}

    def decode_options(self, num_kv_bytes: int) -> dict[str, Any]:
        """Compiler options of the decode kernel for a cache of elements of ``num_kv_bytes``."""
        if self.backend != "cuda":
            return {**self.options(), "num_stages": 2}
        has_large_tiles = self.arch == _TIMED and num_kv_bytes == 2
        num_stages = 3 if has_large_tiles or self.arch in _SMALL_SHARED_MEMORY else 4
        # Only where it is needed: a cap makes ptxas use what it allows. Where it would spill early
        # (with Triton 3.7), as many programs fit with it.
        is_capped = num_kv_bytes == 1 or (num_kv_bytes == 2 and self.arch in _SPILLS_EARLY)
        cap = {"maxnreg": _MAX_REGISTERS} if is_capped else {}
        return {**self.options(), "num_stages": num_stages, **cap}

    @property
    def has_registers_to_spare(self) -> bool:
        """Whether products read no operands from registers, or there are twice as many (AMD)."""
        return self.backend != "cuda" or self.arch in _PRODUCTS_FROM_SHARED

    def prefill_options(self, has_sinks: bool) -> dict[str, Any]:
        """Compiler options of the prefill kernel."""
        num_stages = 2 if self.backend == "hip" else 3
        # ptxas would spill there rather than take more than half of what a thread may have.
        allowed = {"maxnreg": 255} if has_sinks and self.arch in _SMALL_SHARED_MEMORY else {}
        return {**self.options(), "num_warps": 8, "num_stages": num_stages, **allowed}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile-time constants of a kernel, named as its parameters in lower case."""

    head_dim: int
    group: int
    page: int
    tile: int
    rows: int
    rows_per_block: int
    has_sinks: bool
    phase: str
    dot: str

    def constants(self) -> dict[str, Any]:
        """Give the constants by the names of the kernel's parameters."""
        return {field.name.upper(): getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class DecodePlan(Plan):
    """Compile-time constants of the decode kernel, and the number of parts of the window."""

    num_splits: int
    is_ragged: bool

    def constants(self) -> dict[str, Any]:
        constants = super().constants()
        del constants["NUM_SPLITS"]  # the grid says it
        return {**constants, "IS_SPLIT": self.is_split}

    @property
    def num_parts(self) -> int:
        """Number of parts that the keys of a row are divided into."""
        return self.num_splits + self.has_sinks

    @property
    def is_split(self) -> bool:
        """Whether there are parts to merge."""
        return self.num_parts > 1

    @property
    def num_merged(self) -> int:
        """Number of parts that the merge kernel is compiled for, a power of two."""
        return 1 << (self.num_parts - 1).bit_length()

    def num_blocks(self, num_tokens: int, num_reqs: int) -> int:
        """Number of query blocks that is enough however the requests share the tokens."""
        if not self.is_ragged:
            return num_reqs
        # One more request are the rows behind the last, which become zeros.
        return num_tokens // self.rows_per_block + num_reqs + 1


@lru_cache(maxsize=4096)
def plan_decode(
    target: Target,
    *,
    num_tokens: int,
    num_reqs: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    window: int,
    has_sinks: bool,
    is_ragged: bool,
    phase: Phase = Phase.BOTH,
    query_format: NumberFormat,
    kv_format: NumberFormat,
) -> DecodePlan:
    """Plan one decode call; ``window`` is the most keys that a query may see, sinks aside."""
    tile = {4: 16, 2: 64 if target.arch == _TIMED else 32, 1: 32}[kv_format.num_bytes]
    rows = _plan_decode_rows(group)
    rows_per_block = rows // group if is_ragged else 1
    num_blocks = num_tokens // rows_per_block if is_ragged else num_reqs
    num_programs = max(1, num_blocks) * num_kv_heads
    return DecodePlan(
        head_dim=head_dim,
        group=group,
        page=page,
        tile=tile,
        rows=rows,
        rows_per_block=rows_per_block,
        num_splits=choose_splits(
            max(1, ceil_div(window + rows_per_block - 1, tile)), num_programs, target
        ),
        # What stays visible below the window is divided with the window's tiles there.
        has_sinks=has_sinks and phase is not Phase.DECODE,
        phase=phase.value,
        is_ragged=is_ragged,
        dot=_plan_dot_format(target, query_format, kv_format).value,
    )


class PrefillPlan(Plan):
    """Compile-time constants of the prefill kernel."""

    def num_blocks(self, num_tokens: int, num_reqs: int) -> int:
        """Number of query blocks that is enough for all requests and the rows behind the last."""
        return num_tokens // self.rows_per_block + num_reqs + 1


@lru_cache(maxsize=256)
def plan_prefill(
    target: Target,
    *,
    group: int,
    head_dim: int,
    page: int,
    has_sinks: bool,
    phase: Phase = Phase.BOTH,
    query_format: NumberFormat,
    kv_format: NumberFormat,
) -> PrefillPlan:
    """Plan one prefill call; products are in the query's format, which holds every fp8 value."""
    has_sinks = has_sinks or phase is Phase.DECODE  # the prompt stays visible as sinks do
    is_fp8 = kv_format is not query_format
    is_tight = not target.has_registers_to_spare
    rows = _FEWER_PREFILL_ROWS if is_tight and (has_sinks or is_fp8) else _PREFILL_ROWS
    is_small = query_format is NumberFormat.FLOAT32 or (is_tight and has_sinks and is_fp8)
    rows = max(rows, 1 << (group - 1).bit_length())
    return PrefillPlan(
        head_dim=head_dim,
        group=group,
        page=page,
        tile=16 if is_small else 64 if target.arch == _TIMED else 32,
        rows=rows,
        rows_per_block=rows // group,
        has_sinks=has_sinks,
        phase=phase.value,
        dot=_plan_dot_format(target, query_format, query_format).value,
    )


def choose_splits(num_tiles: int, num_programs: int, target: Target) -> int:
    """Choose into how many parts to divide the window's tiles, so that one wave fills the device.

    Args:
        num_programs: programs that a launch without splits would have.
    """
    span = ceil_div(num_tiles, min(num_tiles, _wanted_splits(num_programs, target)))
    return ceil_div(num_tiles, span)


def max_splits(target: Target, num_tokens: int, num_kv_heads: int, group: int) -> int:
    """Give the most splits that a decode plan of ``num_tokens`` queries has for any window."""
    num_blocks = max(1, num_tokens // (_plan_decode_rows(group) // group))
    return _wanted_splits(num_blocks * num_kv_heads, target)


def _wanted_splits(num_programs: int, target: Target) -> int:
    # Larger tiles keep a processor as busy with half of the programs.
    per_processor = _PROGRAMS_PER_PROCESSOR // (2 if target.arch == _TIMED else 1)
    return min(_MAX_SPLITS, max(1, per_processor * target.num_processors // num_programs))


def _plan_decode_rows(group: int) -> int:
    """Give the rows of a decode block, which hold one query with its group of heads at least."""
    return max(_MIN_ROWS, 1 << (group - 1).bit_length())


def _plan_dot_format(
    target: Target, query_format: NumberFormat, kv_format: NumberFormat
) -> NumberFormat:
    """Choose the format of the matrix products; fp16 holds every fp8 value, converted cheaply."""
    if query_format is NumberFormat.FLOAT32:
        return NumberFormat.FLOAT32
    if kv_format.num_bytes == 1:
        return NumberFormat.FLOAT16
    # Triton's interpreter would multiply the bits of bfloat16 elements as integers.
    return NumberFormat.FLOAT32 if target.backend == "cpu" else query_format
