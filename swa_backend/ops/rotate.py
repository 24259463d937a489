"""The operation that moves rotated queries to other positions."""

import torch

from swa_backend import reference
from swa_backend.kernels.device import on_device_of, target_of
from swa_backend.ops.checks import (
    check_integers,
    check_operand_like,
    check_operands_for_kernels,
    check_rows,
    check_same_device,
    check_table,
)
from swa_backend.ops.dispatch import resolve_impl


def rotate_back(
    states: torch.Tensor,
    distances: torch.Tensor,
    table: torch.Tensor,
    *,
    is_neox: bool = True,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Rotate queries, already rotated to their positions, back by ``distances`` positions.

    Args:
        states: fp32, fp16 or bf16 ``[num_tokens, heads, D]``.
        distances: int64 ``[num_tokens]``, of either sign, at most the table's last position.
        table: of the same or another of these dtypes, ``[num_positions, R]``, ``R <= D`` even: the
            cosines of each position, then the sines, all multiplied by one factor (YaRN's).
        is_neox: elements ``i`` and ``i + R / 2`` are a pair; if false, ``2 * i`` and ``2 * i + 1``.
        out: where to write, as states.

    Returns:
        As states; elements from ``R`` on are copied.

    Raises:
        TypeError, ValueError: a dtype, shape or number other than these.
    """
    check_rows("states", states)
    check_integers("distances", distances, torch.int64, (states.shape[0],))
    check_table(table, states)
    check_operand_like("out", out, states, "states")
    check_same_device(states, "states", distances=distances, table=table, out=out)
    out = torch.empty_like(states) if out is None else out
    if resolve_impl(impl, states.device) == "torch":
        return reference.rotate_back(states, distances, table, is_neox=is_neox, out=out)
    check_operands_for_kernels(states.shape[2], states=states, out=out)
    target = target_of(states.device)
    if len(states):
        from swa_backend.kernels.rotate import launch_rotate

        with on_device_of(states):
            launch_rotate(out, states, distances, table, is_neox=is_neox, target=target)
    return out
