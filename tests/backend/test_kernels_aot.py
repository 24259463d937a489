"""Every kernel compiles for every device, within its limits, to what the committed table says."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from swa_backend.kernels.plans import Target
from swa_backend.verify import aot, gate
from swa_backend.verify.aot import Facts, compiling_without_gpu
from tests.helpers.paths import DATA
from tests.helpers.processes import probe_environment
from tests.helpers.tritons import OTHER_TRITONS, triton_directory

pytestmark = pytest.mark.long

TABLE = DATA / "kernels.txt"
# Under the interpreter, which this process runs kernels in, nothing can be compiled.
COMPILE = """
import json, triton
from swa_backend.verify import gate
compiled = gate.compile_gate_cases(gate.{chosen}())
lines = [(gate.format_gate_row(c.name, f), gate.broken_limits(c, f)) for c, f in compiled]
print(json.dumps([triton.__version__, lines]))
"""
COMPILE_ONE = """
import torch, triton
from swa_backend.kernels import device
from swa_backend.verify import gate
gate.verify_decode_compiles(gate.TARGETS[0])
assert triton.knobs.runtime.jit_cache_hook is None
assert triton.runtime.driver._active is None
try:
    device.target_of(torch.device("cpu"))
except ValueError as error:
    print(error)
"""


Lines = list[tuple[str, list[str]]]


def run_compiling(code: str, *first: str) -> str:
    """Output of a process whose Triton compiles; ``first`` comes first on its path."""
    env = {k: v for k, v in probe_environment(*first).items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def compile_with(version: str, chosen: str, *first: str) -> Lines:
    """A line of the table and the broken limits of every chosen case, by a version of Triton."""
    used, lines = json.loads(run_compiling(COMPILE.format(chosen=chosen), *first))
    assert used == version
    return [(line, broken) for line, broken in lines]


@pytest.fixture(scope="module")
def compiled() -> Lines:
    """What the installed Triton makes of every case."""
    return compile_with(triton.__version__, "gate_cases")


def test_every_kernel_keeps_its_limits(compiled: Lines) -> None:
    assert len(compiled) == len(list(gate.gate_cases()))
    assert not {line: broken for line, broken in compiled if broken}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "chosen", ["main_gate_cases", pytest.param("gate_cases", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("version", OTHER_TRITONS)
def test_every_kernel_keeps_its_limits_with_other_tritons(version: str, chosen: str) -> None:
    lines = compile_with(version, chosen, str(triton_directory(version)))
    assert len(lines) == len(list(getattr(gate, chosen)())) > 40
    assert not {line: broken for line, broken in lines if broken}


def test_table_is_current(compiled: Lines) -> None:
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
        ({"registers": 169}, "takes 169 registers, more than 168"),
        ({"kv_buffers": 1}, "keeps a single buffer of keys"),
        ({"programs_per_processor": 2}, "fits only 2 times, not 3"),
    ],
)
def test_broken_limit_is_named(changes: dict[str, Any], broken: str | None) -> None:
    case = gate.Case("decode", "Qwen3-8B", torch.bfloat16, Target("cuda", 90, 132))
    assert gate.broken_limits(case, replace(GOOD, **changes)) == ([broken] if broken else [])


def test_four_programs_have_to_fit_where_plans_count_on_them() -> None:
    case = gate.Case("decode", "Qwen3-8B", torch.bfloat16, Target("cuda", 100, 148))
    many = replace(GOOD, registers=129)
    assert gate.broken_limits(case, many) == ["takes 129 registers, more than 128"]


def test_prefill_without_the_fast_products_is_named() -> None:
    case = gate.Case("prefill", "Qwen3-8B", torch.bfloat16, Target("cuda", 90, 132))
    assert gate.broken_limits(case, GOOD) == ["multiplies by HMMA, not HGMMA"]
    fast = replace(GOOD, product="HGMMA", kv_buffers=1)
    assert gate.broken_limits(case, fast) == []
    slow = replace(fast, is_serialized=True)
    assert gate.broken_limits(case, slow) == ["lets each product wait for the one before"]


@pytest.mark.parametrize(
    ("code", "is_serialized"),
    [
        ("WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 R24 ; HGMMA.64x64x16.F32 R24 ;", False),
        ("WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 ; WARPGROUP.ARRIVE ; HGMMA.64x64x16.F32 ;", True),
        ("HMMA.16816.F32 R4 ;", False),
    ],
)
def test_products_that_wait_are_seen(code: str, is_serialized: bool) -> None:
    assert aot._sass_is_serialized(code) is is_serialized


AMD_LOADS = """
 .loc 1 104 16  ; decode.py:104:16
 global_load_dwordx2 v[6:7], v[2:3], off
 .loc 2 48 5  ; tiles.py:48:5 @[ decode.py:120:20 ]
 buffer_load_dwordx4 v[8:11], v1, s[0:3], 0
"""


def test_a_narrow_load_of_queries_is_not_one_of_keys() -> None:
    assert aot._amd_load_bytes(AMD_LOADS) == 16
    assert aot._amd_load_bytes(AMD_LOADS.replace("dwordx4", "dwordx3")) == 12
    assert aot._amd_load_bytes(AMD_LOADS.replace("tiles", "merge")) == 8
    assert aot._amd_load_bytes("s_load_dwordx2 s[0:1], s[4:5], 0x0") is None


def test_compiling_for_another_device_leaves_no_trace() -> None:
    assert run_compiling(COMPILE_ONE).startswith('impl="triton" does not run on cpu tensors')


def test_compiling_under_the_interpreter_is_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"),
        compiling_without_gpu(Target("cuda", 90, 132)),
    ):
        pass
