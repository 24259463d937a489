"""Queries moved to other positions: the oracle by its definition, the kernel by the oracle."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swa_backend import ops, reference
from tests.helpers.kernels.guard import DEVICE, guarded
from tests.helpers.kernels.mutants import ROTATE_MUTANTS, Mutant, Record, assert_caught

DISTANCES = (0, 1, 7, -3, 40, -40)


@dataclass(frozen=True)
class Case:
    """Heads and dtypes; ``attention_factor`` is in the table, as YaRN's is."""

    num_heads: int = 3
    head_dim: int = 16
    rotary_dim: int = 16
    is_neox: bool = True
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.float32
    attention_factor: float = 1.0

    @property
    def table(self) -> torch.Tensor:
        """Of positions 0 to 99."""
        frequencies = 10.0 ** -torch.linspace(0, 3, self.rotary_dim // 2, dtype=torch.float64)
        angles = torch.arange(100)[:, None] * frequencies
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor
        return table.to(self.table_dtype)


CASES = (
    Case(attention_factor=1.25),
    Case(is_neox=False, num_heads=1, head_dim=64, rotary_dim=64),
    Case(rotary_dim=12, head_dim=32, dtype=torch.float16),
    Case(rotary_dim=8, is_neox=False, dtype=torch.bfloat16, attention_factor=1.5),
    Case(num_heads=8, head_dim=128, rotary_dim=128, dtype=torch.bfloat16),
    Case(table_dtype=torch.bfloat16, dtype=torch.bfloat16, attention_factor=1.25),
)


def check(case: Case, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that the kernel agrees with the oracle, and touches nothing else."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(DISTANCES), case.num_heads, case.head_dim)
    states = torch.randn(shape, generator=generator).to(DEVICE, case.dtype)
    distances, table = torch.tensor(DISTANCES, device=DEVICE), case.table.to(DEVICE)
    arguments: dict[str, Any] = {"is_neox": case.is_neox}
    expected = reference.rotate_back(states.double(), distances, table, **arguments)
    out = states.new_full((len(states), 2 * case.num_heads, case.head_dim), float("nan"))
    with guarded(monkeypatch) as guard:
        for tensor in (states, distances, table, out[:, ::2]):
            guard.watch("any", tensor)
        got = module.rotate_back(
            states, distances, table, **arguments, out=out[:, ::2], impl="triton"
        )
    error = (got.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(case.dtype).eps * expected.abs().max()
    assert out[:, 1::2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, ops, monkeypatch)


@pytest.mark.parametrize("is_neox", [True, False])
def test_oracle_undoes_a_rotation(is_neox: bool) -> None:
    """Rotated at a position, then moved back: rotated at the position that is left."""
    table = Case(table_dtype=torch.float64).table
    states = torch.randn(1, 2, 20, dtype=torch.float64)

    def rotated(position: int) -> torch.Tensor:
        out = states.clone()
        for i in range(8):
            first, second = (i, i + 8) if is_neox else (2 * i, 2 * i + 1)
            cos, sin = table[position, i], table[position, 8 + i]
            out[..., first] = states[..., first] * cos - states[..., second] * sin
            out[..., second] = states[..., second] * cos + states[..., first] * sin
        return out

    moved = reference.rotate_back(rotated(70), torch.tensor([29]), table, is_neox=is_neox)
    assert torch.allclose(moved, rotated(41), rtol=0, atol=1e-12)
    assert torch.equal(moved[..., 16:], states[..., 16:])


def _smoke(module: ModuleType, monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    for case in CASES:
        check(case, module, monkeypatch)


@pytest.mark.parametrize("mutant", ROTATE_MUTANTS, ids=str)
def test_mutant_is_caught(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Record
) -> None:
    assert_caught(mutant, _smoke, monkeypatch, tmp_path)
    record_property("summary: mutants killed", 1)


STATES, TABLE = torch.randn(2, 3, 16), Case().table


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_no_tokens(impl: str) -> None:
    none = torch.zeros(0, 3, 16)
    assert ops.rotate_back(none, torch.zeros(0).long(), TABLE, impl=impl).shape == none.shape
