"""The operation that attends from prefill chunks to their own keys and the pages before them."""

import math

import torch

from swa_backend import reference
from swa_backend.attention_call import AttentionCall, PrefillCall
from swa_backend.kernels.device import on_device_of, target_of
from swa_backend.kernels.plans import Target, plan_prefill
from swa_backend.ops.checks import (
    check_operands_for_kernels,
    check_operands_of_batch,
    check_prefill_call,
)
from swa_backend.ops.dispatch import FORMATS, dispatched_cache_dtype, resolve_impl
from swa_backend.ops.xformers_prefill import prefill_by_xformers


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None,
    sink_tokens: int = 0,
    scale: float | None = None,
    sink_query: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend from each request's last tokens to their own keys and to the pages before these.

    From pages the operation reads only keys that a query sees and that lie before the request's
    first query: the chunk itself need not be stored. The launch depends on shapes, ``window`` and
    ``sink_tokens`` only.

    Args:
        query: fp32, fp16 or bf16 ``[num_tokens, Hq, D]``, ``Hq`` a multiple of ``Hkv``.
        key, value: keys and values of the same tokens, query's dtype, ``[num_tokens, Hkv, D]``.
        kv_cache: the same dtype, or fp8 (e4m3fn, e5m2), ``[num_pages, Hkv, page, 2 * D]``.
        block_table: int32 ``[num_reqs, max_pages]``, page ids in the order of positions.
        query_start_loc: int32 ``[num_reqs + 1]``; request ``r`` has the tokens from entry ``r`` to
            entry ``r + 1``, the last of them at position ``seq_lens[r] - 1``.
        seq_lens: int32 ``[num_reqs]``, tokens including these; 0 marks a padded row.
        window: tokens a query sees, itself included; None for all.
        sink_tokens: leading tokens that every query sees.
        scale: factor of the scores, positive; ``D ** -0.5`` by default.
        sink_query: as query; meets the sinks below the window instead of it.
        k_scale, v_scale: factors of the elements of an fp8 cache; ``key`` and ``value`` are taken
            as they are.
        out: where to write, as query.
        impl: also ``"xformers"``, which waits for the host and has no sinks.

    Returns:
        As query; zeros in padded rows and in those behind the last request's.

    Raises:
        TypeError, ValueError: a dtype, shape or number other than these.
    """
    call = PrefillCall(
        query=query,
        key=key,
        value=value,
        kv_cache=kv_cache,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        window=window,
        sink_tokens=sink_tokens,
        scale=scale,
        sink_query=sink_query,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    check_prefill_call(call, out)
    chosen = resolve_impl(impl, kv_cache.device, others=("xformers",))
    out = torch.empty_like(query) if out is None else out
    if chosen == "torch":
        return reference.prefill_attention(**call.arguments(), out=out)
    return _prefill_by_kernel(call, out) if chosen == "triton" else prefill_by_xformers(call, out)


class PrefillBatch:
    """Prefill attention of one batch of chunks, prepared once for all layers."""

    def __init__(self, call: AttentionCall, target: Target) -> None:
        """Plan a batch; the arguments are as for :class:`~swa_backend.ops.decode.DecodeBatch`."""
        from swa_backend.kernels.prefill import PrefillLaunch

        window, has_sinks = call.reach()
        (_, num_heads, head_dim), num_kv_heads = call.query.shape, call.kv_cache.shape[1]
        self._shape = call.query.shape
        self._view, self._factor = dispatched_cache_dtype(call.kv_cache.dtype, target)
        self._score_scale = call.softmax_scale * math.log2(math.e)
        plan = plan_prefill(
            target,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            page=call.kv_cache.shape[2],
            has_sinks=has_sinks,
            query_format=FORMATS[call.query.dtype],
            kv_format=FORMATS[call.kv_cache.dtype],
        )
        self._launch = PrefillLaunch(call, plan, target, window=window)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        sink_query: torch.Tensor | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Write the attention of a layer to ``out``; launches on the current device.

        The tensors are those of :func:`prefill_attention`, which the caller has checked. Here only
        the shape of queries and the number of tokens are.

        Raises:
            ValueError: the batch has queries of another shape.
        """
        check_operands_of_batch(self._shape, query, key, value, out)
        self._launch(
            query,
            sink_query,
            key,
            value,
            kv_cache if self._view is None else kv_cache.view(self._view),
            out,
            score_scale=self._score_scale,
            key_scale=k_scale * self._factor,
            value_scale=v_scale * self._factor,
        )


def _prefill_by_kernel(call: PrefillCall, out: torch.Tensor) -> torch.Tensor:
    """Launch the kernel for ``call``; returns ``out``."""
    query, key, value, kv_cache = call.query, call.key, call.value, call.kv_cache
    check_operands_for_kernels(
        query.shape[2], query=query, key=key, value=value, sink_query=call.sink_query, out=out
    )
    target = target_of(kv_cache.device)
    if query.shape[0]:
        with on_device_of(kv_cache):
            PrefillBatch(call, target).attend(
                query,
                key,
                value,
                kv_cache,
                out,
                sink_query=call.sink_query,
                k_scale=call.k_scale,
                v_scale=call.v_scale,
            )
    return out
