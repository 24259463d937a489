"""For debugging: free pages hold NaN, which shows in the output of a layer that reads one.

With ``debug_poison`` the attention backend looks at the scheduler's pool before each step, which
works only where both live in one process.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from swa_vllm.attention.layer import windowed_layers
from swa_vllm.kv_cache import live_managers

# NaN in both 8-bit formats (e4m3fn and e5m2), whose caches are stored as bytes.
_NAN_BYTE = 0x7F


class PoisonedPages:
    """Keeps the free pages of one engine filled with NaN."""

    def __init__(self, key: str, clears: bool) -> None:
        """Watch the engine that ``key`` names.

        Args:
            clears: whether pages that are handed out have to be cleared. Where others do it, a
                page may hold a state by now that was copied into it in this step.
        """
        self._key = key
        self._clears = clears
        self._poisoned = set[int]()

    def poison_free_pages(self, kv_caches: list[torch.Tensor]) -> None:
        """Poison pages that became free since the last call; clear those handed out, if asked to.

        Pages in the prefix cache are free too, but a prompt may hit them: they are left alone. The
        null page, which nobody reads, is poisoned at each call.

        Args:
            kv_caches: ``[num_blocks, ...]`` of every layer; several may share memory.
        """
        manager = live_managers.manager_of_engine(self._key)
        if manager is None:  # while the engine is being built
            return
        pool = manager.block_pool
        free = {b.block_id for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is None}
        null = {pool.null_block.block_id}
        for cache in kv_caches:
            if self._clears:
                cache[sorted(self._poisoned - free - null)] = 0
            nan = _NAN_BYTE if cache.dtype == torch.uint8 else float("nan")
            cache[sorted(free - self._poisoned | null)] = nan
        self._poisoned = free


@dataclass(frozen=True)
class NaNCheck:
    """Finds NaN in what the layers return for one step.

    Attributes:
        key: names the engine.
        batch: the step's requests, as vLLM gave them.
        block_size: tokens a page.
    """

    key: str
    batch: CommonAttentionMetadata
    block_size: int

    def raise_on_nan(self, layer_name: str, output: torch.Tensor) -> None:
        """Raise RuntimeError naming request, layer and position of the first NaN.

        Args:
            output: ``[num_tokens, num_heads, head_dim]``.
        """
        bad = output[: self.batch.num_actual_tokens].isnan().flatten(1).any(dim=1).nonzero()
        if len(bad) == 0:
            return
        token = int(bad[0])
        row = int((self.batch.query_start_loc[1:] <= token).sum())
        num_after = int(self.batch.query_start_loc[row + 1]) - token
        position = int(self.batch.seq_lens[row]) - num_after
        raise RuntimeError(
            f"NaN in the output of {layer_name} for request {self._request_at(row)} at position "
            f"{position}: a page was read that the request does not hold, or the model overflowed"
        )

    def _request_at(self, row: int) -> str:
        last_page = (int(self.batch.seq_lens[row]) - 1) // self.block_size
        page = int(self.batch.block_table_tensor[row, last_page])
        manager = live_managers.manager_of_engine(self.key)
        tables = manager.req_to_blocks.items() if manager is not None else ()
        for request_id, blocks in tables:
            if len(blocks) > last_page and blocks[last_page].block_id == page:
                return str(request_id)
        return "unknown"


class PoisonWatch:
    """Poisons free pages before each step, and makes the check of the step's outputs."""

    def __init__(
        self, spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig
    ) -> None:
        self._key: str | None = getattr(spec, "poison_key", None)
        self._block_size = spec.block_size
        self._vllm_config = vllm_config
        self._pages: PoisonedPages | None = None
        if self._key is not None and next(iter(windowed_layers(vllm_config))) in layer_names:
            # One builder does it for all.
            self._pages = PoisonedPages(self._key, clears=not vllm_config.model_config.is_hybrid)

    def watch_step(self, batch: CommonAttentionMetadata) -> NaNCheck | None:
        """Poison free pages; returns the check of the step's outputs, or None without poison."""
        if self._key is None:
            return None
        if self._pages is not None:
            layers = get_layers_from_vllm_config(self._vllm_config, Attention)
            self._pages.poison_free_pages([layer.kv_cache for layer in layers.values()])
        return NaNCheck(self._key, batch, self._block_size)
