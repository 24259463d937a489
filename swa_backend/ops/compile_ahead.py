"""The compilation of every kernel that an attention layer can launch, before it serves."""

from collections.abc import Iterator
from typing import Any

import torch

from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.device import on_device_of, pretend_device, target_of
from swa_backend.kernels.plans import Target
from swa_backend.ops.cache_write import write_pages
from swa_backend.ops.decode import decode_attention, plan_decode_operation
from swa_backend.ops.prefill import prefill_attention
from swa_backend.ops.rotate import rotate_back
from swa_backend.pages import ceil_div
from swa_backend.window import Phase


def compile_kernels(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    window: int,
    sink_tokens: int = 0,
    phase: Phase = Phase.BOTH,
    num_pages: int | None = None,
    has_drafts: bool = False,
    rotations: torch.Tensor | None = None,
    is_neox: bool = True,
    device: torch.device,
) -> None:
    """Compile what the operations launch for a layer on ``device``, and load it onto that device.

    Triton compiles a kernel when it is launched first, which takes seconds: too long for a server
    that answers. Under Triton's interpreter there is nothing to compile.

    Args:
        query: on the meta device, shaped as for :func:`decode_attention`, with as many tokens as a
            batch of decodes may have.
        kv_cache: on the meta device, shaped as the layer's.
        window: tokens a query sees, itself included.
        sink_tokens: leading tokens that every query sees.
        phase: whose queries have the window.
        num_pages: entries of a row of the block table, by which launches differ in a phase other
            than ``BOTH``; those of a window by default.
        has_drafts: whether a request may have several queries in a batch of decodes.
        rotations: the table of :func:`rotate_back`, if queries are rotated before they meet sinks.
        is_neox: as for :func:`rotate_back`.

    Raises:
        TypeError, ValueError: what the operations do not accept; no kernel runs there.
    """
    target, zeros = target_of(device), _zeros_to_compile_ahead(2)
    sight: dict[str, Any] = {"window": window, "sink_tokens": sink_tokens, "phase": phase}
    num_pages = num_pages or ceil_div(window, kv_cache.shape[2])
    with pretend_device(target), on_device_of(torch.empty(0, device=device)):
        key = torch.empty_like(query[:1, : kv_cache.shape[1]])
        write_pages(key, key, kv_cache, zeros[:1].long(), impl="triton")
        if rotations is not None:
            table = rotations.to("meta")
            rotate_back(query[:1], zeros[:1].long(), table, is_neox=is_neox, impl="triton")
        prefill_attention(
            query[:1],
            key,
            key,
            kv_cache,
            zeros[None],
            query_start_loc=zeros,
            seq_lens=zeros[:1],
            prompt_lens=None if phase is Phase.BOTH else zeros[:1],
            **sight,
            impl="triton",
        )
        for is_ragged in (False, True)[: 1 + has_drafts]:
            for call in _decode_calls(target, query, kv_cache, num_pages, sight, is_ragged):
                decode_attention(**call.arguments(), impl="triton")


def _decode_calls(
    target: Target,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    num_pages: int,
    sight: dict[str, Any],
    is_ragged: bool,
) -> Iterator[AttentionCall]:
    """Give a call for each set of kernels that a batch of up to ``len(query)`` queries takes."""
    known = set()
    for num_tokens in range(1, len(query) + 1):
        num_reqs = 1 if is_ragged else num_tokens
        call = AttentionCall(
            query=query[:num_tokens],
            kv_cache=kv_cache,
            block_table=_zeros_to_compile_ahead(num_reqs, num_pages),
            seq_lens=_zeros_to_compile_ahead(num_reqs),
            prompt_lens=(
                None if sight["phase"] is Phase.BOTH else _zeros_to_compile_ahead(num_reqs)
            ),
            query_start_loc=_zeros_to_compile_ahead(2) if is_ragged else None,
            scale=None,
            **sight,
        )
        plan = plan_decode_operation(call, target)
        kernels = (plan.num_merged, *plan.constants().values())
        if kernels not in known:
            known.add(kernels)
            yield call


def _zeros_to_compile_ahead(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32, device="meta")
