"""A gate: every kernel compiled for every device at Qwen3's shapes keeps its limits.

``python -m swa_backend.verify.gate`` prints the table that ``tests/data/kernels.txt`` holds.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import triton

from swa_backend import ops
from swa_backend.kernels.plans import Target
from swa_backend.verify.aot import Facts, compiling_without_gpu, facts_of_compiled

TARGETS = (
    Target("cuda", 80, 108),  # A100
    Target("cuda", 86, 84),  # A40, RTX 30
    Target("cuda", 89, 142),  # L40S, RTX 40
    Target("cuda", 90, 132),  # H100
    Target("cuda", 100, 148),  # B200
    Target("cuda", 120, 188),  # RTX PRO 6000, RTX 50
    Target("hip", "gfx942", 304),  # MI300X
)
# Query heads to a KV head; all have 8 KV heads of 128 elements.
GROUPS = {"Qwen3-8B": 4, "Qwen3-0.6B": 2}
_NAMES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
# The instructions that reach the tensor cores' full rate, of wgmma and tcgen05 in PTX.
_PREFILL_PRODUCTS: dict[int | str, str] = {90: "HGMMA", 100: "UTCHMMA"}
_HEAD_DIM, _NUM_KV_HEADS, _PAGE, _WINDOW = 128, 8, 16, 1024


@dataclass(frozen=True)
class Case:
    """One kernel on one device."""

    kernel: str
    shape: str
    kv_dtype: torch.dtype
    target: Target

    @property
    def name(self) -> str:
        """The first columns of the case's line in the table."""
        arch = self.target.arch
        device = arch if isinstance(arch, str) else f"sm_{arch}"
        return f"{self.kernel:14}{self.shape:12}{_NAMES[self.kv_dtype]:9}{device:8}"

    def compile(self) -> Facts:
        """Compile a launch for the device; returns the facts of the kernel."""
        with compiling_without_gpu(self.target) as kernels:
            if self.kernel == "write":
                _launch_write_case(self.kv_dtype)
            elif self.kernel == "rotate":
                _launch_rotate_case(GROUPS[self.shape])
            elif self.kernel.startswith("prefill"):
                _launch_prefill_case(self)
            else:
                _launch_decode_case(self)
        name = self.kernel.split()[0]
        return facts_of_compiled(kernels[f"{name}_kernel"], self.target)


def _launch_write_case(kv_dtype: torch.dtype) -> None:
    rows = torch.zeros(1, _NUM_KV_HEADS, _HEAD_DIM, dtype=torch.bfloat16)
    ops.write_pages(rows, rows, _large_cache(kv_dtype), torch.zeros(1).long(), impl="triton")


def _launch_rotate_case(group: int) -> None:
    states = torch.zeros(1, _NUM_KV_HEADS * group, _HEAD_DIM, dtype=torch.bfloat16)
    table = torch.zeros(1, _HEAD_DIM, dtype=torch.bfloat16)
    ops.rotate_back(states, torch.zeros(1).long(), table, impl="triton")


def _launch_decode_case(case: Case) -> None:
    """Launch decode attention of one request, of two with drafts, or of too many to split."""
    is_ragged = case.kernel == "decode ragged"
    num_reqs, num_tokens = {"decode ragged": (2, 8), "decode single": (200, 200)}.get(
        case.kernel, (1, 1)
    )
    num_heads = _NUM_KV_HEADS * GROUPS[case.shape]
    ops.decode_attention(
        torch.zeros(num_tokens, num_heads, _HEAD_DIM, dtype=torch.bfloat16),
        _large_cache(case.kv_dtype),
        torch.zeros(num_reqs, 2 * _WINDOW // _PAGE).int(),
        torch.zeros(num_reqs).int(),
        window=_WINDOW,
        sink_tokens=0 if case.kernel in ("decode", "decode single") else 4,
        query_start_loc=torch.tensor([0, 4, 8]).int() if is_ragged else None,
        impl="triton",
    )


def _launch_prefill_case(case: Case) -> None:
    """Launch prefill attention of two chunks of four tokens."""
    query, own = (
        torch.zeros(8, heads, _HEAD_DIM, dtype=torch.bfloat16)
        for heads in (_NUM_KV_HEADS * GROUPS[case.shape], _NUM_KV_HEADS)
    )
    ops.prefill_attention(
        query,
        own,
        own,
        _large_cache(case.kv_dtype),
        torch.zeros(2, 2 * _WINDOW // _PAGE).int(),
        torch.tensor([0, 4, 8]).int(),
        torch.zeros(2).int(),
        window=_WINDOW,
        sink_tokens=4 if case.kernel == "prefill sinks" else 0,
        impl="triton",
    )


def _large_cache(dtype: torch.dtype) -> torch.Tensor:
    """Reserve a cache of over 2 GB, as on a GPU: on AMD smaller ones compile to other loads."""
    return torch.empty(2**16 + 1, _NUM_KV_HEADS, _PAGE, 2 * _HEAD_DIM, dtype=dtype)


def gate_cases() -> Iterator[Case]:
    """Give every case of the table."""
    wide, e4m3, _ = _NAMES
    for target in TARGETS:
        for shape in GROUPS:
            for kv_dtype in _NAMES:
                yield Case("decode", shape, kv_dtype, target)
            yield Case("decode sinks", shape, wide, target)
            yield Case("decode ragged", shape, wide, target)
            yield Case("decode single", shape, wide, target)
        # The merge and the write have no groups: both shapes compile to the same.
        yield Case("merge", "Qwen3-8B", wide, target)
        for kv_dtype in (wide, e4m3):
            yield Case("prefill", "Qwen3-8B", kv_dtype, target)
            yield Case("prefill sinks", "Qwen3-8B", kv_dtype, target)
        yield Case("prefill", "Qwen3-0.6B", wide, target)
        yield Case("write", "Qwen3-8B", wide, target)
        yield Case("write", "Qwen3-8B", e4m3, target)
        yield Case("rotate", "Qwen3-8B", wide, target)


def main_gate_cases() -> Iterator[Case]:
    """Give the cases of Qwen3-8B on data centre GPUs, with caches of bfloat16 and e4m3."""
    for case in gate_cases():
        if (
            case.target.arch in (80, 90, 100, "gfx942")
            and case.shape == "Qwen3-8B"
            and case.kv_dtype is not torch.float8_e5m2
        ):
            yield case


def verify_decode_compiles(target: Target) -> None:
    """Compile the decode kernel of Qwen3-8B for a device.

    Raises:
        RuntimeError: under Triton's interpreter.
    """
    with compiling_without_gpu(target):
        _launch_decode_case(Case("decode", "Qwen3-8B", torch.bfloat16, target))


def compile_gate_cases(chosen: Iterable[Case]) -> Iterator[tuple[Case, Facts]]:
    """Compile the cases, in as many processes as there are processors, and give their facts."""
    chosen = list(chosen)
    with ProcessPoolExecutor() as pool:
        yield from zip(chosen, pool.map(Case.compile, chosen), strict=True)


def broken_limits(case: Case, facts: Facts) -> list[str]:
    """List the limits that the case does not keep."""
    decodes = case.kernel.startswith("decode")
    reads_keys = decodes or case.kernel.startswith("prefill")
    width = 16 if case.kv_dtype.itemsize == 2 else 8
    limits = {
        f"spills {facts.spilled_bytes} bytes": facts.spilled_bytes > 0,
        f"takes {facts.shared_bytes} of {facts.shared_limit} bytes of shared memory": (
            facts.shared_bytes > facts.shared_limit
        ),
        f"loads keys by {facts.load_bytes} bytes, not {width}": (
            reads_keys and (facts.load_bytes or 0) < width
        ),
    }
    if reads_keys and not decodes:
        wanted = _PREFILL_PRODUCTS.get(case.target.arch, facts.product)
        limits[f"multiplies by {facts.product}, not {wanted}"] = facts.product != wanted
        limits["lets each product wait for the one before"] = facts.is_serialized
    if decodes and case.target.arch in (90, 100):
        # On sm_90 plans count on two programs, and shared memory lets no more than three fit.
        most = 168 if case.target.arch == 90 else 128
        limits |= {
            f"takes {facts.registers} registers, more than {most}": facts.registers > most,
            "keeps a single buffer of keys": facts.kv_buffers < 2,
            f"fits only {facts.programs_per_processor} times, not 3": (
                (facts.programs_per_processor or 0) < 3
            ),
        }
    return [text for text, is_broken in limits.items() if is_broken]


def format_gate_row(name: str, facts: Facts) -> str:
    """Format a line of the table, whose columns are fixed: lines are printed as kernels compile."""
    cells = (
        facts.registers,
        facts.spilled_bytes,
        facts.shared_bytes,
        facts.kv_buffers,
        facts.load_bytes,
        facts.programs_per_processor,
        facts.product,
    )
    widths = (9, 7, 7, 8, 6, 9, 9)
    return name + "".join(
        ("-" if cell is None else str(cell)).rjust(width)
        for cell, width in zip(cells, widths, strict=True)
    )


def main() -> None:
    """Print the table."""
    print(f"Triton {triton.__version__}; python -m swa_backend.verify.gate")
    print(
        f"{'kernel':14}{'shape':12}{'cache':9}{'device':8}registers spilled shared buffers", end=""
    )
    print("  loads  programs  product")
    for case, facts in compile_gate_cases(gate_cases()):
        print(format_gate_row(case.name, facts), flush=True)


if __name__ == "__main__":
    main()
