"""Rotates queries and keys that were rotated before, by the model's own table."""

from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from swa_backend.options import SWAConfigError


class Rotation:
    """The rotation of one RoPE, by distances."""

    def __init__(self, rotary: Any) -> None:
        """Take the model's rotary embedding, whose table has cosines and sines of each position.

        Raises:
            SWAConfigError: it has no such table.
        """
        if not hasattr(rotary, "cos_sin_cache"):
            raise SWAConfigError(
                f"swa.position_shift cannot rotate by {type(rotary).__name__}, which has no table "
                "of cosines and sines; remove position_shift"
            )
        self._rotary = rotary

    @property
    def table(self) -> torch.Tensor:
        """``[num_positions, R]``: cosines, then sines."""
        table: torch.Tensor = self._rotary.cos_sin_cache
        return table

    @property
    def is_neox(self) -> bool:
        """Whether pairs are halves apart, not neighbours."""
        return bool(self._rotary.is_neox_style)

    def __call__(self, states: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys as if each stood ``distances`` positions further on.

        Args:
            states: ``[n, num_heads, head_size]``, rotated at their positions.
            distances: int64 ``[n]``, of either sign.
        """
        table = self.table
        # YaRN's attention factor is in the table, and in the states already.
        cos, sin = (table[distances.abs()].float() / table[0, 0].float()).chunk(2, dim=-1)
        sin = sin * distances.sign()[:, None]
        size = self._rotary.rotary_dim
        turned = ApplyRotaryEmb.forward_static(
            states[..., :size], cos, sin, self.is_neox, enable_fp32_compute=True
        )
        return torch.cat((turned, states[..., size:]), dim=-1)
