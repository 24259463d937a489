"""Every kernel compiles for every device, within its limits, to what the committed table says."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from swa_backend.kernels.plans import Target
from swa_backend.verify import aot, gate
from swa_backend.verify.aot import Facts, compiling
from tests.helpers.paths import DATA

TABLE = DATA / "kernels.txt"
# Under the interpreter, which this process runs kernels in, nothing can be compiled.
COMPILE = """
import json
from swa_backend.verify import gate
lines = [(gate.format_row(c.name, f), gate.violations(c, f)) for c, f in gate.compile_all()]
print(json.dumps(lines))
"""
COMPILE_ONE = """
import torch, triton
from swa_backend.kernels import device
from swa_backend.verify import gate
gate.compile_decode(gate.TARGETS[0])
assert triton.knobs.runtime.jit_cache_hook is None
assert triton.runtime.driver._active is None
try:
    device.target_of(torch.device("cpu"))
except ValueError as error:
    print(error)
"""


def run_compiling(code: str) -> str:
    """Output of a process whose Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def compiled() -> list[tuple[str, list[str]]]:
    """A line of the table and the broken limits of every case."""
    return [(line, broken) for line, broken in json.loads(run_compiling(COMPILE))]


def test_every_kernel_keeps_its_limits(compiled: list[tuple[str, list[str]]]) -> None:
    assert len(compiled) == len(list(gate.cases()))
    assert not {line: broken for line, broken in compiled if broken}


def test_table_is_current(compiled: list[tuple[str, list[str]]]) -> None:
    title, _, *lines = TABLE.read_text().splitlines()
    if f"Triton {triton.__version__};" not in title:
        pytest.skip(f"the table is of another version ({title}); regenerate it")
    assert lines == [line for line, _ in compiled], (
        "regenerate it: python -m swa_backend.verify.gate > tests/data/kernels.txt"
    )


GOOD = Facts(
    registers=128,
    spilled_bytes=0,
    shared_bytes=1000,
    shared_limit=1000,
    kv_buffers=2,
    load_bytes=16,
    programs_per_processor=3,
    product="HMMA",
)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 1001}, "takes 1001 of 1000 bytes of shared memory"),
        ({"load_bytes": 8}, "loads keys by 8 bytes, not 16"),
        ({"load_bytes": None}, "loads keys by None bytes, not 16"),
        ({"registers": 129}, "takes 129 registers, more than 128"),
        ({"kv_buffers": 1}, "keeps a single buffer of keys"),
        ({"programs_per_processor": 2}, "fits only 2 times, not 3"),
    ],
)
def test_broken_limit_is_named(changes: dict[str, Any], broken: str | None) -> None:
    case = gate.Case("decode", "Qwen3-8B", torch.bfloat16, Target("cuda", 90, 132))
    assert gate.violations(case, replace(GOOD, **changes)) == ([broken] if broken else [])


def test_prefill_without_the_fast_products_is_named() -> None:
    case = gate.Case("prefill", "Qwen3-8B", torch.bfloat16, Target("cuda", 90, 132))
    assert gate.violations(case, GOOD) == ["multiplies by HMMA, not HGMMA"]
    fast = replace(GOOD, product="HGMMA", kv_buffers=1)
    assert gate.violations(case, fast) == []
    slow = replace(fast, is_serialized=True)
    assert gate.violations(case, slow) == ["lets each product wait for the one before"]


@pytest.mark.parametrize(
    ("code", "is_serialized"),
    [
        ("WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 R24 ; HGMMA.64x64x16.F32 R24 ;", False),
        ("WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 ; WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 ;", True),
        ("HMMA.16816.F32 R4 ;", False),
    ],
)
def test_products_that_wait_are_seen(code: str, is_serialized: bool) -> None:
    assert aot._is_serialized(code) is is_serialized


def test_compiling_for_another_device_leaves_no_trace() -> None:
    assert run_compiling(COMPILE_ONE).startswith('impl="triton" does not run on cpu tensors')


def test_compiling_under_the_interpreter_is_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"),
        compiling(Target("cuda", 90, 132)),
    ):
        pass
