"""The arguments of a call of paged attention, as one value.

:mod:`swa_backend.ops` builds it from a caller's arguments and checks it once; implementations and
launchers take it as one argument, with what they write beside it.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from swa_backend.window import Phase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """Arguments of :func:`swa_backend.ops.decode_attention`, which describes them."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    window: int | None
    sink_tokens: int
    scale: float | None
    sink_query: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    phase: Phase = Phase.BOTH
    prompt_lens: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Give the arguments by name, as the oracle takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def softmax_scale(self) -> float:
        """Scale of the scores, ``D ** -0.5`` by default."""
        return self.query.shape[2] ** -0.5 if self.scale is None else self.scale

    @property
    def num_slots(self) -> int:
        """Slots that a row of the block table names; at least 1."""
        return max(1, self.block_table.shape[1] * self.kv_cache.shape[2])

    @property
    def kernel_window(self) -> int:
        """Window in tokens, for full attention one that no text outgrows."""
        return self.num_slots if self.window is None else self.window

    @property
    def most_visible(self) -> int:
        """Most keys that a query may see, sinks aside.

        No launch depends on the width of the block table but by this number: of full attention, and
        of phases in which some queries see everything.
        """
        return self.kernel_window if self.phase is Phase.BOTH else self.num_slots

    @property
    def has_sinks(self) -> bool:
        """Whether sinks may lie below a query's window."""
        return self.window is not None and self.sink_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillCall(AttentionCall):
    """Arguments of :func:`swa_backend.ops.prefill_attention`, which describes them."""

    query_start_loc: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
