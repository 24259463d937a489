"""Every kernel compiled for every device at Qwen3's shapes, and the limits that they must keep.

``python -m swa_backend.kernels.gate`` prints the table that ``tests/data/kernels.txt`` holds.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from swa_backend.kernels.aot import Argument, Facts, compile_kernel, read_facts
from swa_backend.kernels.cache_write import write_kernel
from swa_backend.kernels.decode import decode_kernel, merge_kernel
from swa_backend.kernels.plans import DecodePlan, NumberFormat, Target, plan_decode

TARGETS = (
    Target("cuda", 80, 108),  # A100
    Target("cuda", 86, 84),  # A40, RTX 30
    Target("cuda", 89, 142),  # L40S, RTX 40
    Target("cuda", 90, 132),  # H100
    Target("cuda", 100, 148),  # B200
    Target("cuda", 120, 188),  # RTX PRO 6000, RTX 50
    Target("hip", "gfx942", 304),  # MI300X
)
# Query heads to a KV head; all have 8 KV heads of 128 numbers.
GROUPS = {"Qwen3-8B": 4, "Qwen3-0.6B": 2}
_HEAD_DIM, _NUM_KV_HEADS, _PAGE, _WINDOW = 128, 8, 16, 1024
_POINTER = {
    NumberFormat.BFLOAT16: "*bf16",
    NumberFormat.E4M3: "*fp8e4nv",
    NumberFormat.E5M2: "*fp8e5",
}
_STRIDE = Argument("i32", aligned=True)


@dataclass(frozen=True)
class Case:
    """One kernel on one device."""

    kernel: str
    shape: str
    kv_format: NumberFormat
    target: Target

    @property
    def name(self) -> str:
        arch = self.target.arch
        device = arch if isinstance(arch, str) else f"sm_{arch}"
        return f"{self.kernel:14}{self.shape:12}{self.kv_format.value:9}{device:8}"

    def compile(self) -> Facts:
        """Compile as a launch would."""
        function, arguments = {
            "decode": _decode,
            "decode sinks": _decode,
            "decode ragged": _decode,
            "merge": _merge,
            "write": _write,
        }[self.kernel](self)
        kernel = compile_kernel(function, self.target, arguments, self.target.options())
        return read_facts(kernel, self.target)

    def plan(self) -> DecodePlan:
        """Of one request, or of two that verify drafts."""
        is_ragged = self.kernel == "decode ragged"
        return plan_decode(
            self.target,
            num_tokens=8 if is_ragged else 1,
            num_reqs=2 if is_ragged else 1,
            num_kv_heads=_NUM_KV_HEADS,
            group=GROUPS[self.shape],
            head_dim=_HEAD_DIM,
            page=_PAGE,
            window=_WINDOW,
            has_sinks=self.kernel != "decode",
            is_ragged=is_ragged,
            query_format=NumberFormat.BFLOAT16,
            kv_format=self.kv_format,
        )


def cases() -> Iterator[Case]:
    """All of them."""
    wide, e4m3, e5m2 = NumberFormat.BFLOAT16, NumberFormat.E4M3, NumberFormat.E5M2
    for target in TARGETS:
        for kv_format in (wide, e4m3, e5m2):
            yield Case("decode", "Qwen3-8B", kv_format, target)
        yield Case("decode", "Qwen3-0.6B", wide, target)
        yield Case("decode sinks", "Qwen3-8B", wide, target)
        yield Case("decode ragged", "Qwen3-8B", wide, target)
        yield Case("merge", "Qwen3-8B", wide, target)
        yield Case("write", "Qwen3-8B", wide, target)
        yield Case("write", "Qwen3-8B", e4m3, target)


def compile_all() -> Iterator[tuple[Case, Facts]]:
    """Every case with its facts, compiled by as many processes as there are processors."""
    with ProcessPoolExecutor() as pool:
        yield from zip(cases(), pool.map(Case.compile, cases()), strict=True)


def violations(case: Case, facts: Facts) -> list[str]:
    """Limits that the case does not keep."""
    reads_keys = case.kernel.startswith("decode")
    width = 16 if case.kv_format.num_bytes == 2 else 8
    limits = {
        f"spills {facts.spilled_bytes} bytes": facts.spilled_bytes > 0,
        f"takes {facts.shared_bytes} of {facts.shared_limit} bytes of shared memory": (
            facts.shared_bytes > facts.shared_limit
        ),
        f"loads keys by {facts.load_bytes} bytes, not {width}": (
            reads_keys and (facts.load_bytes or 0) < width
        ),
    }
    if reads_keys and case.target.arch in (90, 100):
        limits |= {
            f"takes {facts.registers} registers, more than 128": facts.registers > 128,
            "keeps a single buffer of keys": facts.kv_buffers < 2,
            f"fits only {facts.programs_per_processor} times, not 3": (
                (facts.programs_per_processor or 0) < 3
            ),
        }
    return [text for text, is_broken in limits.items() if is_broken]


def decode_arguments(plan: DecodePlan, kv_pointer: str) -> dict[str, Any]:
    """Arguments of the decode kernel as a launch gives them."""
    aligned = {
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "query_ptr": "*bf16",
        "sink_query_ptr": "*bf16",
        "kv_ptr": kv_pointer,
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
    }
    start_loc = Argument("*i32", aligned=True) if plan.is_ragged else None
    return {
        **{name: Argument(kind, aligned=True) for name, kind in aligned.items()},
        **dict.fromkeys((n for n in decode_kernel.arg_names if n.startswith("stride_")), _STRIDE),
        "query_start_loc_ptr": start_loc,
        "stride_kv_dim": 1,
        **dict.fromkeys(("num_reqs", "window", "sink_tokens"), Argument("i32")),
        **dict.fromkeys(("score_scale", "value_scale"), Argument("fp32")),
        **plan.constants(),
        "DOT": tl.dtype(plan.dot),
    }


def _decode(case: Case) -> tuple[Any, dict[str, Any]]:
    as_bytes = case.kv_format is NumberFormat.E4M3 and not case.target.reads_e4m3
    pointer = "*u8" if as_bytes else _POINTER[case.kv_format]
    return decode_kernel, decode_arguments(case.plan(), pointer)


def _merge(case: Case) -> tuple[Any, dict[str, Any]]:
    num_parts = case.plan().num_parts
    pointers = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
    return merge_kernel, {
        **{name: Argument(kind, aligned=True) for name, kind in pointers.items()},
        "query_start_loc_ptr": None,
        "stride_out_token": _STRIDE,
        "stride_out_head": _STRIDE,
        "num_reqs": Argument("i32"),
        "HEAD_DIM": _HEAD_DIM,
        "NUM_PARTS": num_parts,
        "PARTS": triton.next_power_of_2(num_parts),
        "IS_RAGGED": False,
    }


def _write(case: Case) -> tuple[Any, dict[str, Any]]:
    mantissa = {NumberFormat.E4M3: 3, NumberFormat.E5M2: 2}.get(case.kv_format, 0)
    kv_pointer = "*u8" if mantissa else _POINTER[case.kv_format]
    pointers = {"key_ptr": "*bf16", "value_ptr": "*bf16", "kv_ptr": kv_pointer}
    pointers["slot_mapping_ptr"] = "*i64"
    return write_kernel, {
        **{name: Argument(kind, aligned=True) for name, kind in pointers.items()},
        **dict.fromkeys((n for n in write_kernel.arg_names if n.startswith("stride_")), _STRIDE),
        "stride_kv_dim": 1,
        **dict.fromkeys(("key_factor", "value_factor"), Argument("fp32")),
        "NUM_HEADS": _NUM_KV_HEADS,
        "HEADS": _NUM_KV_HEADS,
        "HEAD_DIM": _HEAD_DIM,
        "PAGE": _PAGE,
        "MANTISSA": mantissa,
    }


def format_row(name: str, facts: Facts) -> str:
    """A line of the table."""
    cells = (
        facts.registers,
        facts.spilled_bytes,
        facts.shared_bytes,
        facts.kv_buffers,
        facts.load_bytes,
        facts.programs_per_processor,
    )
    widths = (9, 7, 7, 8, 6, 9)
    return name + "".join(
        ("-" if cell is None else str(cell)).rjust(width)
        for cell, width in zip(cells, widths, strict=True)
    )


def main() -> None:
    """Print the table."""
    print(f"Triton {triton.__version__}; python -m swa_backend.kernels.gate")
    print(
        f"{'kernel':14}{'shape':12}{'cache':9}{'device':8}registers spilled shared buffers", end=""
    )
    print("  loads  programs")
    for case, facts in compile_all():
        print(format_row(case.name, facts), flush=True)


if __name__ == "__main__":
    main()
