"""The prefill kernel in Triton's interpreter: equal to the oracle, reading what its queries see.

As in ``test_kernels.py`` smoke cases run each time, mutations show what they catch, and ``-m full``
runs the grid.
"""

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch

from swa_backend import ops
from swa_backend.window import Phase
from tests.helpers.kernels.cases import DTYPES
from tests.helpers.kernels.mutants import PREFILL_MUTANTS, Mutant, Record, assert_caught
from tests.helpers.kernels.prefill_cases import PrefillCase, check_prefill

PREFILL = (
    PrefillCase(window=17, chunks=((20, 30), (0, 3), (5, 1)), num_kv_heads=2, num_padding=2),
    PrefillCase(window=50, chunks=((90, 40), (-3, 3), (0, 0)), group=5, page=32),
    PrefillCase(window=24, chunks=((100, 20),), sink_tokens=20, group=4, is_shifted=True),
    PrefillCase(window=16, chunks=((3, 70),), sink_tokens=5, is_shifted=True),
    PrefillCase(window=None, chunks=((40, 9),), sink_tokens=4, by_token=True),
    PrefillCase(window=33, chunks=((64, 65),), dtype=torch.float16, head_dim=128, is_far=True),
    PrefillCase(window=5, chunks=((100003, 2),), sink_tokens=1, dtype=torch.bfloat16, group=1),
    PrefillCase(window=32, chunks=((50, 8),), dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    PrefillCase(
        window=32,
        chunks=((2, 60),),
        sink_tokens=4,
        dtype=torch.float16,
        kv_dtype=torch.float8_e5m2,
        by_token=True,
    ),
    PrefillCase(
        window=20,
        chunks=((70, 90), (100, 3), (30, 5)),
        sink_tokens=3,
        is_shifted=True,
        phase=Phase.PREFILL,
        prompt_lens=(100, 40, 60),
    ),
    PrefillCase(
        window=20,
        chunks=((40, 100), (100, 3), (30, 5), (-2, 2), (50, 4)),
        sink_tokens=3,
        group=4,
        num_padding=1,
        phase=Phase.DECODE,
        prompt_lens=(65, 40, 60, 7, 1),
    ),
    PrefillCase(
        window=9,
        chunks=((2, 200),),
        dtype=torch.bfloat16,
        kv_dtype=torch.float8_e4m3fn,
        phase=Phase.DECODE,
        prompt_lens=(1,),
    ),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_equals_the_oracle(
    case: PrefillCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_prefill(case, ops, monkeypatch, tmp_path)


def _smoke(module: ModuleType, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    for case in PREFILL:
        check_prefill(case, module, monkeypatch, directory)


@pytest.mark.parametrize("mutant", PREFILL_MUTANTS, ids=str)
def test_mutant_is_caught(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Record
) -> None:
    assert_caught(mutant, _smoke, monkeypatch, tmp_path)
    record_property("summary: mutants killed", 1)


def _grid() -> list[PrefillCase]:
    """Every window with every number of sinks, group and page; the rest takes turns."""
    windows = (1, 5, 16, 17, 32, 50, 64, None)
    product = itertools.product(windows, (0, 1, 4, 20), (1, 2, 4, 5, 8), (16, 32, 64, 128))
    dtypes = itertools.cycle(DTYPES)
    phases = itertools.cycle((Phase.BOTH, Phase.PREFILL, Phase.DECODE))
    cases = []
    for index, ((window, sinks, group, page), (dtype, kv_dtype), phase) in enumerate(
        zip(product, dtypes, phases, strict=False)
    ):
        size = window or 40
        phase = phase if window else Phase.BOTH
        batches = itertools.cycle(
            (
                ((0, 1), (size - 1, 2), (3 * size, 33), (0, 0)),
                ((0, 70), (-2, 2), (size, 31)),
                ((2 * size + 1, 130),),
                ((100003 if window and phase is Phase.BOTH else 103, 40), (5, 3)),
            )
        )
        chunks = next(itertools.islice(batches, index % 4, None))
        case = PrefillCase(
            window=window,
            chunks=chunks,
            page=page,
            sink_tokens=sinks,
            group=group,
            num_kv_heads=1 + index % 11 // 10,
            head_dim=(64, 128)[index // 3 % 2],
            dtype=dtype,
            kv_dtype=kv_dtype,
            is_shifted=bool(sinks and window and index % 4 and phase is not Phase.DECODE),
            by_token=index % 7 > 3,
            is_far=index % 29 == 0,
            num_padding=index % 2,
            phase=phase,
            # Inside the chunk, before it and behind it.
            prompt_lens=tuple(
                max(1, context + (num_queries // 2, -1, num_queries)[(index + i) % 3])
                for i, (context, num_queries) in enumerate(chunks)
            )
            if phase is not Phase.BOTH
            else (),
        )
        cases.append(case)
    return cases


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("case", _grid(), ids=str)
def test_prefill_equals_the_oracle_on_the_grid(
    case: PrefillCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_prefill(case, ops, monkeypatch, tmp_path)
