"""xformers' masks, which nobody here wrote, say the same about the window as we do."""

import platform
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_backend.window import is_visible

if platform.machine() != "x86_64":
    pytest.skip("xformers has wheels for x86_64 only", allow_module_level=True)

from xformers.ops.fmha.attn_bias import (
    BlockDiagonalMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
)

windows = st.integers(1, 24)
# Of a request: tokens before its queries, and queries.
requests = st.tuples(st.integers(0, 20), st.integers(1, 12))


def expected(batch: Sequence[tuple[int, int]], window: int) -> torch.Tensor:
    """Bool ``[Q, K]`` of the requests' queries and keys, one request after the other."""
    blocks = [
        torch.tensor(
            [
                [is_visible(query, key, window) for key in range(context + num_queries)]
                for query in range(context, context + num_queries)
            ]
        )
        for context, num_queries in batch
    ]
    return torch.block_diag(*blocks) > 0


@settings(max_examples=300)
@given(st.lists(requests, min_size=1, max_size=4), windows)
def test_local_mask_of_a_batch(batch: list[tuple[int, int]], window: int) -> None:
    num_queries = [queries for _, queries in batch]
    num_keys = [context + queries for context, queries in batch]
    mask = BlockDiagonalMask.from_seqlens(num_queries, num_keys)
    local = mask.make_local_attention_from_bottomright(window)
    shape = (sum(num_queries), sum(num_keys))
    assert torch.equal(local.materialize(shape) == 0, expected(batch, window))


@settings(max_examples=300)
@given(requests, windows)
def test_local_mask_of_one_text(request_: tuple[int, int], window: int) -> None:
    context, num_queries = request_
    mask = LowerTriangularFromBottomRightLocalAttentionMask(_window_size=window)
    got = mask.materialize((num_queries, context + num_queries)) == 0
    assert torch.equal(got, expected([request_], window))
