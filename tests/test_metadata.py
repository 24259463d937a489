"""The window-relative view: same attention, nothing below the window looked at."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend import pages, reference
from swa_vllm.metadata import rows_with_holes, select_rows, window_view
from swa_vllm.scratch import scratch_layout

rows = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=4)


def _batch(computed: list[int], queries: list[int], table: torch.Tensor) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(computed, dtype=torch.int32) + starts.diff()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(queries),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(queries),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.arange(int(starts[-1])),
    )


@given(rows, st.integers(1, 60), st.sampled_from([1, 4, 16]), st.integers(0, 999))
def test_view_gives_the_attention_of_the_whole_row(
    batch: list[tuple[int, int]], window: int, page_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    computed, queries = map(list, zip(*batch, strict=True))
    num_tokens = [c + q for c, q in batch]
    width = pages.ceil_div(max(num_tokens), page_size)
    pool_size = width * len(batch)
    pool = torch.randn(pool_size, 1, page_size, 4, generator=generator, dtype=torch.float64)
    table = torch.randperm(pool_size, generator=generator).view(len(batch), width).int()
    dense = [reference.gather_pages(pool, t, n) for t, n in zip(table, num_tokens, strict=True)]
    for row, done in zip(table, computed, strict=True):
        # What the window freed belongs to someone else by now.
        dead = pages.WindowPages(window, page_size).first_live(done)
        pool[row[:dead].long()] = float("nan")
        row[:dead] = -1

    view = window_view(_batch(computed, queries, table), window, page_size)
    for i, (done, num_queries) in enumerate(batch):
        query = torch.randn(1, num_queries, 4, generator=generator, dtype=torch.float64)
        whole = torch.arange(num_tokens[i])
        mask = reference.visible_mask(whole[done:], whole, window)
        expected = reference.attention(query, dense[i], dense[i], mask)

        length = int(view.seq_lens[i])
        assert length <= num_queries + window - 1 + page_size - 1
        live = view.block_table_tensor[i, : pages.ceil_div(length, page_size)]
        assert (live >= 0).all()
        keys = reference.gather_pages(pool, live, length)
        relative = torch.arange(length)
        mask = reference.visible_mask(relative[length - num_queries :], relative, window)
        assert torch.allclose(reference.attention(query, keys, keys, mask), expected)


def test_view_keeps_slots_and_queries_and_the_engines_row() -> None:
    table = torch.arange(12, dtype=torch.int32).view(2, 6)
    batch = _batch([40, 3], [1, 5], table)
    view = window_view(batch, 8, 8)
    assert view.slot_mapping is batch.slot_mapping
    assert view.query_start_loc is batch.query_start_loc
    assert view.seq_lens.tolist() == [9, 8]
    assert view.seq_lens.dtype == view.block_table_tensor.dtype == torch.int32
    assert view.block_table_tensor.tolist() == [[4, 5], [6, 7]]
    assert batch.seq_lens.tolist() == [41, 8]
    assert torch.equal(table, torch.arange(12, dtype=torch.int32).view(2, 6))


@given(rows, st.integers(1, 40), st.sampled_from([2, 4, 16]), st.integers(0, 999))
def test_scratch_pages_give_the_attention_of_the_whole_row(
    batch: list[tuple[int, int]], window: int, page_size: int, seed: int
) -> None:
    """Pages are stored but for the holes; the chunk's own keys are at hand."""
    generator = torch.Generator().manual_seed(seed)
    computed, queries = map(list, zip(*batch, strict=True))
    num_tokens = [c + 4 * q for c, q in batch]  # chunks long enough to have holes
    queries = [4 * q for q in queries]
    width = pages.ceil_div(max(num_tokens), page_size)
    pool_size = width * len(batch) + 1
    pool = torch.randn(pool_size, 1, page_size, 4, generator=generator, dtype=torch.float64)
    table = (torch.randperm(pool_size - 1, generator=generator) + 1).view(len(batch), width).int()
    dense = [reference.gather_pages(pool, t, n) for t, n in zip(table, num_tokens, strict=True)]
    rules = pages.WindowPages(window, page_size)
    expected_holes = []
    for row, done, n in zip(table, computed, num_tokens, strict=True):
        holes = rules.holes(pages.ceil_div(done, page_size), n)
        row[holes.start : holes.stop] = 0
        expected_holes.append(len(holes) > 0)
    pool[0] = float("nan")

    view = window_view(_batch(computed, queries, table), window, page_size)
    assert rows_with_holes(view, page_size) == expected_holes
    part = select_rows(view, len(batch) // 2, len(batch))
    layout = scratch_layout(part, page_size)
    scratch = torch.zeros(layout.num_pages, *pool.shape[1:], dtype=torch.float64)
    scratch[layout.targets] = pool[layout.sources]
    slots = iter(layout.slots.tolist())
    for i in range(part.num_reqs):
        whole = dense[len(batch) // 2 + i]
        done, num_queries = computed[len(batch) // 2 + i], queries[len(batch) // 2 + i]
        for position in range(done, done + num_queries):
            slot = next(slots)
            scratch[slot // page_size, :, slot % page_size] = whole[:, position]
        length = int(layout.batch.seq_lens[i])
        used = layout.batch.block_table_tensor[i, : pages.ceil_div(length, page_size)]
        keys = reference.gather_pages(scratch, used, length)
        query = torch.randn(1, num_queries, 4, generator=generator, dtype=torch.float64)
        relative, absolute = torch.arange(length), torch.arange(done + num_queries)
        mask = reference.visible_mask(relative[length - num_queries :], relative, window)
        expected_mask = reference.visible_mask(absolute[done:], absolute, window)
        expected = reference.attention(query, whole, whole, expected_mask)
        assert torch.allclose(reference.attention(query, keys, keys, mask), expected)
    assert next(slots, None) is None
