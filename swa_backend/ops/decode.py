"""The operation that attends from decoding requests to the pages of their windows."""

import math

import torch

from swa_backend import reference
from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.device import on_device_of, target_of
from swa_backend.kernels.plans import DecodePlan, Target, max_splits, plan_decode
from swa_backend.ops.checks import (
    check_call,
    check_one_query_each,
    check_operands_for_kernels,
    check_operands_of_batch,
    check_scratch,
)
from swa_backend.ops.dispatch import FORMATS, dispatched_cache_dtype, resolve_impl


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None,
    sink_tokens: int = 0,
    scale: float | None = None,
    sink_query: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend from each request's last tokens to its pages, as :mod:`swa_backend.window` says.

    Slots without a visible key, and table entries of pages without one, are not read. The launch
    depends on shapes, ``window`` and ``sink_tokens`` only, so a CUDA graph can hold it.

    Args:
        query: fp32, fp16 or bf16 ``[num_tokens, Hq, D]``, ``Hq`` a multiple of ``Hkv``. With an fp8
            cache 16-bit queries are multiplied as fp16.
        kv_cache: the same dtype, or fp8 (e4m3fn, e5m2), ``[num_pages, Hkv, page, 2 * D]``; holds
            the queries' own keys already.
        block_table: int32 ``[num_reqs, max_pages]``, page ids in the order of positions.
        seq_lens: int32 ``[num_reqs]``, tokens including the queries; 0 marks a padded row.
        window: tokens a query sees, itself included; None for all.
        sink_tokens: leading tokens that every query sees.
        scale: factor of the scores, positive; ``D ** -0.5`` by default.
        sink_query: as query; meets the sinks below the window instead of it.
        query_start_loc: int32 ``[num_reqs + 1]``; request ``r`` has the queries from entry ``r`` to
            entry ``r + 1``, the last of them at position ``seq_lens[r] - 1``. One each by default.
        k_scale, v_scale: factors of the elements of an fp8 cache.
        out: where to write, as query.
        scratch: fp32 ``[n]``, overwritten, ``n`` at least :func:`decode_scratch_size`; allocated by
            default.

    Returns:
        As query; zeros in padded rows and in those behind the last request's.

    Raises:
        TypeError, ValueError: a dtype, shape or number other than these.
    """
    call = AttentionCall(
        query=query,
        kv_cache=kv_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        window=window,
        sink_tokens=sink_tokens,
        scale=scale,
        sink_query=sink_query,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    check_call(call, out)
    if scratch is not None:
        check_scratch(scratch, kv_cache)
    check_one_query_each(call)
    chosen = resolve_impl(impl, kv_cache.device)
    out = torch.empty_like(query) if out is None else out
    if chosen == "torch":
        return reference.decode_attention(**call.arguments(), out=out)
    return _decode_by_kernels(call, out, scratch)


def decode_scratch_size(
    max_tokens: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sink_tokens: int = 0,
    device: torch.device,
) -> int:
    """Count the scratch elements that any batch of 1 to ``max_tokens`` queries needs on ``device``.

    Raises:
        ValueError: no kernel runs there.
    """
    target, group = target_of(device), num_heads // num_kv_heads
    num_rows = 0
    for num_tokens in range(1, max_tokens + 1):
        num_parts = max_splits(target, num_tokens, num_kv_heads, group) + (sink_tokens > 0)
        if num_parts > 1:  # a single part is the output
            num_rows = max(num_rows, num_tokens * num_parts)
    return num_rows * num_heads * (head_dim + 1)


class DecodeBatch:
    """Decode attention of one batch of requests, prepared once for all layers."""

    def __init__(self, call: AttentionCall, target: Target) -> None:
        """Plan a batch.

        Args:
            call: checked; of ``query`` and ``kv_cache`` only shapes and dtypes count.
            target: the device that the kernels run on.
        """
        from swa_backend.kernels.decode import DecodeLaunch

        self._shape = call.query.shape
        self._view, self._factor = dispatched_cache_dtype(call.kv_cache.dtype, target)
        self._score_scale = call.softmax_scale * self._factor * math.log2(math.e)
        self._plan = plan_decode_operation(call, target)
        self._launch = DecodeLaunch(
            call,
            self._plan,
            target,
            window=call.reach()[0],
            num_kv_bytes=call.kv_cache.element_size(),
        )

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        sink_query: torch.Tensor | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """Write the attention of a layer to ``out``; launches on the current device.

        The tensors are those of :func:`decode_attention`, which the caller has checked. Here only
        the shape of queries and the number of tokens are.

        Raises:
            ValueError: the batch has queries of another shape, or needs more scratch.
        """
        check_operands_of_batch(self._shape, query, out)
        self._launch(
            query,
            sink_query,
            kv_cache if self._view is None else kv_cache.view(self._view),
            out,
            *_divide_scratch(query, self._plan, scratch),
            score_scale=self._score_scale * k_scale,
            value_scale=v_scale * self._factor,
        )


def _decode_by_kernels(
    call: AttentionCall, out: torch.Tensor, scratch: torch.Tensor | None
) -> torch.Tensor:
    """Launch the kernels for ``call``; returns ``out``."""
    query, kv_cache = call.query, call.kv_cache
    check_operands_for_kernels(query.shape[2], query=query, sink_query=call.sink_query, out=out)
    target = target_of(kv_cache.device)
    if query.shape[0] == 0 or call.seq_lens.shape[0] == 0 or call.block_table.shape[1] == 0:
        return out.zero_()
    with on_device_of(kv_cache):
        DecodeBatch(call, target).attend(
            query,
            kv_cache,
            out,
            sink_query=call.sink_query,
            k_scale=call.k_scale,
            v_scale=call.v_scale,
            scratch=scratch,
        )
    return out


def plan_decode_operation(call: AttentionCall, target: Target) -> DecodePlan:
    """Plan the launch of ``call``."""
    (num_tokens, num_heads, head_dim), num_kv_heads = call.query.shape, call.kv_cache.shape[1]
    window, has_sinks = call.reach()
    return plan_decode(
        target,
        num_tokens=num_tokens,
        num_reqs=call.seq_lens.shape[0],
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        page=call.kv_cache.shape[2],
        window=window,
        has_sinks=has_sinks,
        is_ragged=call.query_start_loc is not None,
        query_format=FORMATS[call.query.dtype],
        kv_format=FORMATS[call.kv_cache.dtype],
    )


def _divide_scratch(
    query: torch.Tensor, plan: DecodePlan, scratch: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Divide scratch into outputs ``[num_tokens, Hq, num_parts, D]`` and log-sum-exps of the parts.

    Allocates scratch if the caller gave none; a single part needs none.
    """
    if not plan.is_split:
        return None, None
    shape = (*query.shape[:2], plan.num_parts, query.shape[2])
    num_outputs = math.prod(shape)
    num_needed = num_outputs + num_outputs // query.shape[2]
    if scratch is None:
        scratch = torch.empty(num_needed, dtype=torch.float32, device=query.device)
    elif scratch.shape[0] < num_needed:
        raise ValueError(
            f"scratch has {scratch.shape[0]} elements, this batch needs {num_needed}; "
            "decode_scratch_size says what is enough"
        )
    return scratch[:num_outputs].view(shape), scratch[num_outputs:num_needed]
