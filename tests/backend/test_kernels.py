"""The kernels in Triton's interpreter: equal to the oracle, and reading nothing that is not theirs.

The smoke cases run each time and the mutations show what they catch; ``-m full`` runs the grid.
"""

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch

from swa_backend import ops, reference
from swa_backend.window import Phase
from tests.helpers.kernels.cases import DTYPES, DecodeCase, WriteCase, check_decode, check_write
from tests.helpers.kernels.guard import DEVICE
from tests.helpers.kernels.mutants import MUTANTS, Mutant, Record, assert_caught, load_kernels

DECODE = (
    DecodeCase(window=50, seq_lens=(77, 0, 13), num_kv_heads=2),
    DecodeCase(window=64, seq_lens=(150,), sink_tokens=20, group=4, is_shifted=True),
    DecodeCase(
        window=17,
        seq_lens=(40, 20, 0),
        num_queries=(4, 1, 0),
        sink_tokens=4,
        group=5,
        num_padding=2,
    ),
    DecodeCase(
        window=9, seq_lens=(40, 20, 0), num_queries=(7, 4, 0), num_kv_heads=4, num_padding=2
    ),
    DecodeCase(window=30, seq_lens=(90, 2), num_queries=(4, 2), group=4, dtype=torch.float16),
    DecodeCase(window=None, seq_lens=(70,), sink_tokens=4, by_token=True, num_kv_heads=2),
    DecodeCase(window=16, seq_lens=(16, 17), page=32, dtype=torch.float16, head_dim=128),
    DecodeCase(window=5, seq_lens=(100003,), sink_tokens=1, dtype=torch.bfloat16, group=1),
    DecodeCase(window=32, seq_lens=(60,), dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    DecodeCase(window=32, seq_lens=(60,), dtype=torch.float16, kv_dtype=torch.float8_e5m2),
    DecodeCase(window=20, seq_lens=(45,), dtype=torch.float16, is_far=True, by_token=True),
    DecodeCase(
        window=20,
        seq_lens=(90, 60, 61, 0),
        sink_tokens=3,
        is_shifted=True,
        phase=Phase.PREFILL,
        prompt_lens=(40, 60, 60, 5),
    ),
    DecodeCase(
        window=17,
        seq_lens=(80, 40, 20),
        num_queries=(5, 4, 3),
        group=3,
        sink_tokens=2,
        num_padding=1,
        phase=Phase.PREFILL,
        prompt_lens=(77, 10, 60),
    ),
    DecodeCase(
        window=18,
        seq_lens=(150, 60, 61, 0, 90),
        num_kv_heads=2,
        phase=Phase.DECODE,
        prompt_lens=(70, 60, 60, 5, 85),
    ),
    DecodeCase(
        window=17,
        seq_lens=(130, 40, 20, 60),
        num_queries=(5, 4, 3, 2),
        group=3,
        sink_tokens=4,
        num_padding=1,
        dtype=torch.float16,
        phase=Phase.DECODE,
        prompt_lens=(33, 38, 60, 1),
    ),
)


WRITE = (
    WriteCase(slots=(40, -1, 3), num_padding=1),
    WriteCase(slots=(0, 17), dtype=torch.bfloat16, by_token=True, page=32),
    WriteCase(slots=(5, 6), dtype=torch.float16, is_far=True, by_token=True),
    WriteCase(slots=(9, 1), dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    WriteCase(slots=(9, 1), dtype=torch.float16, kv_dtype=torch.float8_e5m2, by_token=True),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_equals_the_oracle(
    case: DecodeCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_decode(case, ops, monkeypatch, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "window", [512, *(pytest.param(window, marks=pytest.mark.full) for window in (1024, 4096))]
)
def test_decode_of_a_long_text_reads_its_window_once(
    window: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = DecodeCase(window=window, seq_lens=(131072 - 5,), group=4, head_dim=128)
    check_decode(case, ops, monkeypatch, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WRITE, ids=str)
def test_write_equals_the_oracle(
    case: WriteCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_write(case, ops, monkeypatch, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_half_precision_number_becomes_the_nearest_fp8(dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.float16).view(4, 128, 128)
    stored, expected = torch.zeros(2, 1, 128, 4, 256).to(dtype)
    slots = torch.arange(4)
    on_device = stored.to(DEVICE)
    ops.write_pages(
        numbers.to(DEVICE), -numbers.to(DEVICE), on_device, slots.to(DEVICE), impl="triton"
    )
    stored = on_device.cpu()
    reference.write_pages(numbers, -numbers, expected, slots)
    is_nan = expected.float().isnan()
    assert torch.equal(stored.float().isnan(), is_nan)
    assert torch.equal(stored.view(torch.uint8)[~is_nan], expected.view(torch.uint8)[~is_nan])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_number_is_read_exactly(dtype: torch.dtype) -> None:
    """One key a token and a window of one: the output is the value."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(dtype).view(4, 64)
    cache = torch.cat([torch.zeros_like(finite), finite], dim=-1).view(4, 1, 1, 128).to(DEVICE)
    table = torch.arange(4, device=DEVICE).int()[:, None]
    query, lengths = torch.zeros(4, 1, 64, device=DEVICE), torch.ones(4, device=DEVICE).int()
    got = ops.decode_attention(query, cache, table, lengths, window=1, impl="triton")
    assert torch.equal(got.view(4, 64).cpu(), finite.float())


def _smoke(module: ModuleType, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    for write_case in WRITE:  # first: they are the faster ones
        check_write(write_case, module, monkeypatch, directory)
    for case in DECODE:
        check_decode(case, module, monkeypatch, directory)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Record
) -> None:
    assert_caught(mutant, _smoke, monkeypatch, tmp_path)
    record_property("summary: mutants killed", 1)


def test_kernels_loaded_without_a_mutation_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load_kernels(monkeypatch, tmp_path, None)
    check_decode(DECODE[0], module, monkeypatch, tmp_path)
    check_write(WRITE[0], module, monkeypatch, tmp_path)


def _grid() -> list[DecodeCase]:
    """Every window with every number of sinks, group and page; the rest takes turns."""
    windows = (1, 5, 16, 17, 32, 50, 64, None)
    product = itertools.product(windows, (0, 1, 4, 20), (1, 2, 4, 5, 8), (16, 32, 64, 128))
    dtypes = itertools.cycle(DTYPES)
    drafts = itertools.cycle((None, None, (2, 0, 1, 5, 3), (1, 1, 4, 1, 2), None))
    phases = itertools.cycle((Phase.BOTH, Phase.PREFILL, Phase.DECODE))
    cases = []
    for index, ((window, sinks, group, page), types, num_queries, phase) in enumerate(
        zip(product, dtypes, drafts, phases, strict=False)
    ):
        size = window or 70
        phase = phase if window else Phase.BOTH
        longest = 100003 if window and phase is Phase.BOTH else 203
        seq_lens = (0, size - 1, size, size + 1, longest)
        if num_queries is not None:  # a request has no more queries than tokens
            num_queries = tuple(map(min, num_queries, seq_lens))
        case = DecodeCase(
            window=window,
            seq_lens=seq_lens,
            page=page,
            sink_tokens=sinks,
            group=group,
            num_kv_heads=1 + index % 11 // 10,
            head_dim=(64, 128)[index // 3 % 2],
            dtype=types[0],
            kv_dtype=types[1],
            num_queries=num_queries,
            is_shifted=bool(sinks and window and index % 4 and phase is not Phase.DECODE),
            by_token=index % 7 > 3,
            is_far=index % 29 == 0,
            num_padding=index % 2 if num_queries else 0,
            phase=phase,
            prompt_lens=(3, size - 2, size, 1, 100 + index % 103)
            if phase is not Phase.BOTH
            else (),
        )
        cases.append(case)
    return cases


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("case", _grid(), ids=str)
def test_decode_equals_the_oracle_on_the_grid(
    case: DecodeCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_decode(case, ops, monkeypatch, tmp_path)


@pytest.mark.gpu
@pytest.mark.full
def test_full_attention_over_a_long_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = DecodeCase(window=None, seq_lens=(100003,), page=128, head_dim=128)
    check_decode(case, ops, monkeypatch, tmp_path)
