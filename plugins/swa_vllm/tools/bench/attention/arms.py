"""The arms of one attention call: this project's kernels and others', called alike.

Each function prepares a batch and returns one call for each of its block tables. It raises
ValueError for what its kernels cannot do, and ImportError where they are not installed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from swa_backend import ops
from swa_backend.window import first_visible, flash_attention_window, flashinfer_window_left

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Requests of equal length, each with one query that decodes or with those of a chunk.

    Attributes:
        query: ``[num_tokens, Hq, D]``.
        key, value: ``[num_tokens, Hkv, D]`` of the same tokens and dtype; the pages of the first
            table hold them too.
        kv_cache: of the query's dtype or e4m3, ``[num_pages, Hkv, page, 2 * D]``.
        tables: int32 ``[B, max_pages]``, several with different pages; entries below the window
            are page 0, as vLLM's null page.
        seq_lens: int32 ``[B]``, all ``seq_len``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    tables: Sequence[torch.Tensor]
    seq_lens: torch.Tensor
    seq_len: int
    window: int

    @property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cache, ``[num_pages, Hkv, page, D]`` each."""
        key, value = self.kv_cache.chunk(2, dim=-1)
        return key, value

    @property
    def num_queries(self) -> int:
        """Queries of each request."""
        return len(self.query) // len(self.seq_lens)

    @property
    def start_loc(self) -> torch.Tensor:
        """Index of each request's first query, and their number, int32 ``[B + 1]``."""
        starts = torch.arange(len(self.seq_lens) + 1, device=self.seq_lens.device)
        return (starts * self.num_queries).int()

    def refuse_fp8(self, reason: str) -> None:
        """Raise ValueError with this reason if the cache holds e4m3."""
        if self.kv_cache.element_size() == 1:
            raise ValueError(reason)


def our_kernels(batch: Batch, impl: str = "triton") -> list[Call]:
    """Attend with :mod:`swa_backend.ops`: decode or prefill, by the queries of a request."""
    out, start_loc = torch.empty_like(batch.query), batch.start_loc

    def run(table: torch.Tensor) -> torch.Tensor:
        if batch.num_queries == 1:
            return ops.decode_attention(
                batch.query,
                batch.kv_cache,
                table,
                batch.seq_lens,
                window=batch.window,
                out=out,
                impl=impl,
            )
        return ops.prefill_attention(
            batch.query,
            batch.key,
            batch.value,
            batch.kv_cache,
            table,
            start_loc,
            batch.seq_lens,
            window=batch.window,
            out=out,
            impl=impl,
        )

    return [partial(run, table) for table in batch.tables]


def vllm_triton(batch: Batch) -> list[Call]:
    """Attend as TRITON_ATTN does: a split kernel for few decodes, the plain one otherwise.

    Few are up to 16 decodes of 8 KV heads.
    """
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    key, value = (half.transpose(1, 2) for half in batch.halves)
    is_fp8 = batch.kv_cache.element_size() == 1
    num_kv_heads = batch.kv_cache.shape[1]
    # The plain kernel has no use for scratch, which would be gigabytes for a chunk.
    num_rows = len(batch.query) if batch.num_queries == 1 else 1
    lse_shape = (num_rows, batch.query.shape[1], NUM_PAR_SOFTMAX_SEGMENTS)
    scratch = torch.empty(*lse_shape, batch.query.shape[2], device=batch.query.device)
    tops, sums = torch.empty(2, *lse_shape, device=batch.query.device)
    ones = torch.ones(len(batch.seq_lens), num_kv_heads, device=batch.query.device)
    out, start_loc = torch.empty_like(batch.query), batch.start_loc

    def run(table: torch.Tensor) -> torch.Tensor:
        unified_attention(
            q=batch.query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=start_loc,
            max_seqlen_q=batch.num_queries,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.seq_len,
            softmax_scale=batch.query.shape[2] ** -0.5,
            causal=True,
            window_size=flash_attention_window(batch.window),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=ones,
            v_descale=ones,
            seq_threshold_3D=MIN_LAUNCH_GRID_SIZE_2D // num_kv_heads,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=scratch,
            softmax_segm_max=tops,
            softmax_segm_expsum=sums,
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if is_fp8 else KVQuantMode.NONE,
        )
        return out

    return [partial(run, table) for table in batch.tables]


def flash_attn(batch: Batch) -> list[Call]:
    """Attend as FLASH_ATTN does, in the version that vLLM chooses for the device."""
    batch.refuse_fp8("wants fp8 queries too")
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=batch.query.shape[2])
    key, value = (half.transpose(1, 2) for half in batch.halves)
    out, start_loc = torch.empty_like(batch.query), batch.start_loc

    def run(table: torch.Tensor) -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=start_loc,
            max_seqlen_q=batch.num_queries,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.seq_len,
            causal=True,
            window_size=list(flash_attention_window(batch.window)),
            block_table=table,
            fa_version=version,
        )
        return out

    return [partial(run, table) for table in batch.tables]


def flashinfer(batch: Batch) -> list[Call]:
    """Attend with FlashInfer's paged kernels, planned beforehand as vLLM does once a step."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    num_reqs, num_pages = batch.tables[0].shape
    page, device = batch.kv_cache.shape[2], batch.query.device
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    out = torch.empty_like(batch.query)
    page_starts = torch.arange(num_reqs + 1, dtype=torch.int32) * num_pages
    last_page_len = torch.full((num_reqs,), (batch.seq_len - 1) % page + 1, dtype=torch.int32)
    shape = {
        "num_qo_heads": batch.query.shape[1],
        "num_kv_heads": batch.kv_cache.shape[1],
        "page_size": page,
        "window_left": flashinfer_window_left(batch.window),
        "q_data_type": batch.query.dtype,
        "kv_data_type": batch.kv_cache.dtype,
    }
    head_dim = batch.query.shape[2]

    def call(table: torch.Tensor) -> Call:
        pages = page_starts, table.flatten(), last_page_len
        if batch.num_queries == 1:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            wrapper.plan(*pages, head_dim=head_dim, **shape)
        else:
            wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            starts = batch.start_loc.cpu()
            wrapper.plan(starts, *pages, head_dim_qk=head_dim, causal=True, **shape)
        return lambda: wrapper.run(batch.query, batch.halves, out=out)

    return [call(table) for table in batch.tables]


def xformers(batch: Batch) -> list[Call]:
    """Attend with xformers' local mask; as it is not paged, keys are gathered before the clock."""
    batch.refuse_fp8("has no fp8 cache")
    from xformers.ops import fmha

    num_reqs, num_queries = len(batch.seq_lens), batch.num_queries
    num_heads, head_dim = batch.query.shape[1:]
    num_kv_heads, page = batch.kv_cache.shape[1:3]
    grouped = (num_kv_heads, num_heads // num_kv_heads, head_dim)
    first = first_visible(batch.seq_len - num_queries, batch.window)
    positions = torch.arange(first, batch.seq_len, device=batch.query.device)
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
        [num_queries] * num_reqs, [len(positions)] * num_reqs, device=batch.query.device
    ).make_local_attention_from_bottomright(batch.window)

    def call(table: torch.Tensor) -> Call:
        rows = batch.kv_cache[table[:, positions // page].long(), :, positions % page]
        key, value = (
            half.reshape(1, -1, num_kv_heads, 1, head_dim).expand(1, -1, *grouped)
            for half in rows.chunk(2, dim=-1)
        )
        query = batch.query.view(1, -1, *grouped)
        return lambda: fmha.memory_efficient_attention_forward(
            query, key, value, attn_bias=mask
        ).view_as(batch.query)

    return [call(table) for table in batch.tables]


OURS = "here"
KERNEL_ARMS: dict[str, Callable[[Batch], list[Call]]] = {
    OURS: our_kernels,
    "TRITON_ATTN": vllm_triton,
    "FLASH_ATTN": flash_attn,
    "FlashInfer": flashinfer,
    "xformers": xformers,
}
