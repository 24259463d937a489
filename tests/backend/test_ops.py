"""The operations on pages: what they refuse, and how they choose an implementation and a launch."""

import inspect
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swa_backend import ops, reference
from swa_backend.kernels.device import detect_target, pretend_device, target_of
from swa_backend.kernels.plans import (
    NumberFormat,
    Target,
    choose_splits,
    max_splits,
    plan_decode,
    plan_prefill,
)
from tests.bad_input.operations import arguments_of

H100 = Target("cuda", 90, num_processors=132)


def decode_arguments(**changes: Any) -> dict[str, Any]:
    return arguments_of("decode_attention") | changes


def write_arguments(**changes: Any) -> dict[str, Any]:
    return arguments_of("write_pages") | changes


def prefill_arguments(**changes: Any) -> dict[str, Any]:
    return arguments_of("prefill_attention") | changes


@pytest.mark.parametrize(
    "name", ["decode_attention", "prefill_attention", "rotate_back", "write_pages"]
)
def test_oracle_has_the_same_signature(name: str) -> None:
    signature = inspect.signature(getattr(ops, name))
    parameters = [p for p in signature.parameters.values() if p.name not in ("impl", "scratch")]
    expected = signature.replace(parameters=parameters)
    assert inspect.signature(getattr(reference, name)) == expected


@pytest.mark.parametrize(
    ("hip", "target"), [(None, Target("cuda", 90, 132)), ("7.0", Target("hip", "gfx942", 132))]
)
def test_target_of_a_gpu(hip: str | None, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942:sramecc+:xnack-"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert detect_target.__wrapped__(torch.device("cuda", 0)) == target


def test_a_device_passes_for_the_target_that_is_compiled_for() -> None:
    here = target_of(torch.device("cpu"))
    with pretend_device(H100):
        assert target_of(torch.device("cpu")) == target_of(torch.device("meta")) == H100
    assert target_of(torch.device("cpu")) == here


def test_auto_is_the_oracle_on_the_cpu() -> None:
    arguments = decode_arguments()
    expected = reference.decode_attention(**arguments)
    for impl in ("auto", "torch"):
        assert torch.equal(ops.decode_attention(**arguments, impl=impl), expected)
    arguments = prefill_arguments()
    expected = reference.prefill_attention(**arguments)
    assert torch.equal(ops.prefill_attention(**arguments), expected)
    written = write_arguments()
    ops.write_pages(**written)
    assert torch.equal(written["kv_cache"][2, :, 8, :16], written["key"][1])


def test_output_goes_where_it_is_asked_to() -> None:
    for impl in ("torch", "triton"):
        out = torch.full((2, 8, 16), float("nan"))[:, ::2]
        got = ops.decode_attention(**decode_arguments(), out=out, impl=impl)
        assert got is out
        assert out.isfinite().all()


def test_scratch_is_used_and_none_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = decode_arguments(sink_tokens=2)
    expected = ops.decode_attention(**arguments, impl="triton")
    size = ops.decode_scratch_size(
        2, num_heads=4, num_kv_heads=2, head_dim=16, sink_tokens=2, device=torch.device("cpu")
    )
    scratch = torch.full((size,), float("nan"))
    with monkeypatch.context() as patch:
        patch.delattr(torch, "empty")
        got = ops.decode_attention(**arguments, impl="triton", scratch=scratch)
    assert torch.equal(got, expected)
    assert not scratch.isnan().all()
    with pytest.raises(
        ValueError, match=r"scratch has 3 elements, this batch needs \d+; decode_sc"
    ):
        ops.decode_attention(**arguments, impl="triton", scratch=scratch[:3])


def test_a_single_part_needs_no_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel stores the output; so do all batches where one request fills the device."""
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "device": torch.device("cpu")}
    assert ops.decode_scratch_size(9, **shape) == 0
    assert ops.decode_scratch_size(9, **shape, sink_tokens=1) == 9 * 8 * 2 * 17
    with pretend_device(H100):
        sizes = [ops.decode_scratch_size(n, **shape) for n in (23, 300, 10_000)]
    # Most are taken by the largest batch in 32 parts; those of more than 264 programs have one.
    assert sizes == [23 * 32 * 8 * 17] * 3
    arguments = decode_arguments(
        query=torch.ones(2, 8, 16), kv_cache=torch.ones(3, 4, 16, 32), scratch=torch.zeros(0)
    )
    with monkeypatch.context() as patch:
        patch.delattr(torch, "empty")
        got = ops.decode_attention(**arguments, out=torch.zeros(2, 8, 16), impl="triton")
    assert got.eq(1).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_to_do(impl: str) -> None:
    empty = decode_arguments(
        query=torch.zeros(0, 4, 16),
        block_table=torch.zeros(0, 2).int(),
        seq_lens=torch.zeros(0).int(),
    )
    assert ops.decode_attention(**empty, impl=impl).shape == (0, 4, 16)
    padding = {**empty, "query": torch.ones(3, 4, 16), "query_start_loc": torch.zeros(1).int()}
    assert not ops.decode_attention(**padding, impl=impl).any()
    ops.write_pages(**write_arguments(slot_mapping=torch.zeros(0).long()), impl=impl)
    none = torch.zeros(0, 2, 16)
    chunks = empty | {"key": none, "value": none, "query_start_loc": torch.zeros(1).int()}
    assert ops.prefill_attention(**chunks, impl=impl).shape == (0, 4, 16)


def test_triton_on_the_cpu_without_its_interpreter_says_what_to_do() -> None:
    code = """
import torch
from swa_backend import ops
x = torch.zeros(1, 1, 16)
ops.write_pages(x, x, torch.zeros(1, 1, 16, 32), torch.zeros(1).long(), impl="triton")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    error = result.stderr.splitlines()[-1]
    assert error.startswith('ValueError: impl="triton" does not run on cpu tensors')
    assert "set TRITON_INTERPRET=1 before Triton is imported" in error


def test_devices_without_bfloat16_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'sm_75 .compute capability 7\.5. .* use impl="torch"'):
        Target("cuda", 75, num_processors=40)


@pytest.mark.parametrize(
    ("num_tiles", "num_programs", "splits"),
    [(32, 8, 32), (128, 8, 32), (16, 8, 16), (32, 64, 4), (32, 512, 1), (1, 1, 1), (9, 64, 3)],
)
def test_splits_fill_the_device_and_none_is_empty(
    num_tiles: int, num_programs: int, splits: int
) -> None:
    got = choose_splits(num_tiles, num_programs, H100)
    assert got == splits
    span = -(-num_tiles // got)
    assert (got - 1) * span < num_tiles <= got * span


@pytest.mark.parametrize("group", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_no_plan_splits_more_than_scratch_is_made_for(group: int, is_ragged: bool) -> None:
    for num_tokens, window in product((*range(1, 70), 512, 4096), (1, 16, 1024, 10**6)):
        made = plan(
            H100,
            NumberFormat.FLOAT32,
            NumberFormat.FLOAT32,
            num_tokens=num_tokens,
            num_reqs=num_tokens,
            group=group,
            window=window,
            is_ragged=is_ragged,
        )
        assert made.num_splits <= max_splits(H100, num_tokens, 8, group)


def plan(
    target: Target, query_format: NumberFormat, kv_format: NumberFormat, **changes: Any
) -> Any:
    shape = {"num_tokens": 4, "num_reqs": 4, "num_kv_heads": 8, "group": 4, "head_dim": 128}
    rest = {"page": 16, "window": 1024, "has_sinks": False, "is_ragged": False}
    formats = {"query_format": query_format, "kv_format": kv_format}
    return plan_decode(target, **{**shape, **rest, **changes}, **formats)


def test_products_are_in_a_dtype_that_holds_both_operands() -> None:
    bf16, fp16, fp32 = NumberFormat.BFLOAT16, NumberFormat.FLOAT16, NumberFormat.FLOAT32
    interpreter = Target("cpu", 0, num_processors=1)
    assert plan(H100, bf16, bf16).dot == "bf16"
    assert plan(H100, bf16, NumberFormat.E4M3).dot == "fp16"
    assert plan(H100, fp32, NumberFormat.E5M2).dot == "fp32"
    assert plan(H100, fp16, fp16).dot == "fp16"
    assert plan(interpreter, bf16, bf16).dot == "fp32"


def test_large_groups_get_the_rows_they_need() -> None:
    bf16 = NumberFormat.BFLOAT16
    assert plan(H100, bf16, bf16, group=20).rows == 32
    ragged = plan(H100, bf16, bf16, group=5, is_ragged=True, num_tokens=12)
    assert (ragged.rows, ragged.rows_per_block, ragged.num_blocks(12, 4)) == (16, 3, 9)


@pytest.mark.parametrize(
    ("arch", "has_sinks", "kv_format", "rows", "tile"),
    [
        (90, True, NumberFormat.E4M3, 128, 64),
        (100, True, NumberFormat.E4M3, 128, 32),
        (80, False, NumberFormat.BFLOAT16, 128, 32),
        (80, True, NumberFormat.BFLOAT16, 64, 32),
        (89, False, NumberFormat.E5M2, 64, 32),
        (89, True, NumberFormat.E5M2, 64, 16),
    ],
)
def test_prefill_blocks_shrink_where_registers_are_short(
    arch: int, has_sinks: bool, kv_format: NumberFormat, rows: int, tile: int
) -> None:
    got = plan_prefill(
        Target("cuda", arch, num_processors=100),
        group=5,
        head_dim=128,
        page=16,
        has_sinks=has_sinks,
        query_format=NumberFormat.BFLOAT16,
        kv_format=kv_format,
    )
    assert (got.rows, got.rows_per_block, got.tile) == (rows, rows // 5, tile)
    assert got.num_blocks(100, 3) == 100 // got.rows_per_block + 4


def test_kernels_read_nothing_through_a_table_without_entries() -> None:
    query = torch.ones(2, 4, 16)
    arguments = decode_arguments(
        query=query, block_table=torch.zeros(2, 0).int(), seq_lens=torch.ones(2).int()
    )
    out = ops.decode_attention(**arguments, out=torch.ones_like(query), impl="triton")
    assert not out.any()
