"""What the CPU builder makes of a batch: the same attention from other places."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend import pages, reference
from swa_backend.window import Phase, is_visible
from swa_vllm.attention.cpu.answer_table import answer_tables
from swa_vllm.attention.cpu.batches import (
    rows_with_holes,
    select_rows,
    split_at_prompt_ends,
)
from swa_vllm.attention.cpu.ghost_tail import ghost_tail
from swa_vllm.attention.cpu.page_layout import PageLayout
from swa_vllm.attention.cpu.scratch import lay_out_chunk_pages

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


def _pool(
    batch: list[tuple[int, int]], page_size: int, generator: torch.Generator, spare: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Pages of random numbers, a table of them, and each row's numbers in a line."""
    num_tokens = [computed + queries for computed, queries in batch]
    width = pages.ceil_div(max(num_tokens) + spare, page_size)
    pool_size = width * len(batch) + 1
    pool = torch.randn(pool_size, 1, page_size, 4, generator=generator, dtype=torch.float64)
    table = (torch.randperm(pool_size - 1, generator=generator) + 1).view(len(batch), width).int()
    dense = [reference.gather_pages(pool, t, n) for t, n in zip(table, num_tokens, strict=True)]
    pool[0] = float("nan")
    return pool, table, dense


def _attend(query: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """What vLLM's operators do: the queries are the last keys, and see one run of ``window``."""
    positions = torch.arange(keys.shape[1])
    mask = reference.reference_mask(positions[-query.shape[1] :], positions, window)
    return reference.attention(query, keys, keys, mask)


@given(
    rows,
    st.integers(1, 40),
    st.sampled_from([2, 4, 16]),
    st.sampled_from([0, 0, 1, 5, 20]),
    st.integers(0, 999),
)
def test_scratch_pages_give_the_attention_of_the_whole_row(
    batch: list[tuple[int, int]], window: int, page_size: int, sinks: int, seed: int
) -> None:
    """Pages are stored but for the holes; the chunk's own keys are at hand."""
    generator = torch.Generator().manual_seed(seed)
    batch = [(computed, 4 * queries) for computed, queries in batch]  # long enough for holes
    computed, queries = map(list, zip(*batch, strict=True))
    pool, table, dense = _pool(batch, page_size, generator)
    rules = pages.WindowPages(window, page_size, sinks)
    expected_holes = []
    for row, (done, num_queries) in zip(table, batch, strict=True):
        holes = rules.holes(pages.ceil_div(done, page_size), done + num_queries)
        row[holes.start : holes.stop] = 0
        dead = rules.dead(done)
        row[dead.start : dead.stop] = -1
        expected_holes.append(len(holes) > 0)

    whole = _batch(computed, queries, table)
    assert rows_with_holes(whole, window, page_size) == expected_holes
    first = len(batch) // 2
    part = select_rows(whole, first, len(batch))
    layout = lay_out_chunk_pages(part, window, page_size, sinks)
    scratch = torch.zeros(layout.num_pages, *pool.shape[1:], dtype=torch.float64)
    scratch[layout.targets] = pool[layout.sources]
    slots = scratch.transpose(1, 2).flatten(0, 1)  # a copy
    own = [d[:, c:] for d, (c, _) in zip(dense[first:], batch[first:], strict=True)]
    slots[layout.slots] = torch.cat(own, dim=1).transpose(0, 1)[layout.tokens]
    slots[layout.sink_targets] = pool.transpose(1, 2).flatten(0, 1)[layout.sink_sources]
    scratch = slots.view(layout.num_pages, page_size, 1, 4).transpose(1, 2)

    query = torch.randn(1, part.num_actual_tokens, 4, generator=generator, dtype=torch.float64)
    outputs = []
    starts = layout.batch.query_start_loc.tolist()
    for i, length in enumerate(layout.batch.seq_lens.tolist()):
        used = layout.batch.block_table_tensor[i, : pages.ceil_div(length, page_size)]
        keys = reference.gather_pages(scratch, used, length)
        outputs.append(_attend(query[:, starts[i] : starts[i + 1]], keys, window + sinks))
    expected, start = [], 0
    for keys, (done, num_queries) in zip(dense[first:], batch[first:], strict=True):
        positions = torch.arange(done + num_queries)
        mask = reference.reference_mask(positions[done:], positions, window, sinks)
        own_query = query[:, start : start + num_queries]
        expected.append(reference.attention(own_query, keys, keys, mask))
        start += num_queries
    assert torch.allclose(torch.cat(outputs, 1), torch.cat(expected, 1))


@given(
    rows,
    st.integers(1, 40),
    st.sampled_from([2, 4, 16]),
    st.sampled_from([1, 5, 20]),
    st.integers(0, 999),
)
def test_ghost_tail_gives_the_attention_of_the_whole_row(
    batch: list[tuple[int, int]], window: int, page_size: int, sinks: int, seed: int
) -> None:
    """Only requests that compute one token and have left their sinks behind get one."""
    generator = torch.Generator().manual_seed(seed)
    computed, queries = map(list, zip(*batch, strict=True))
    pool, table, dense = _pool(batch, page_size, generator, spare=sinks)
    slots = pool.transpose(1, 2).flatten(0, 1)
    tail = ghost_tail(_batch(computed, queries, table), window, sinks, page_size)
    slots[tail.targets] = slots[tail.sources]
    pool = slots.view(len(pool), page_size, 1, 4).transpose(1, 2)
    distances = iter(tail.distances.tolist())
    for i, (done, num_queries) in enumerate(batch):
        length = int(tail.batch.seq_lens[i])
        if num_queries > 1 or done + 1 <= window + sinks:
            assert length == done + num_queries
            continue
        assert length == done + 1 + sinks
        assert {next(distances) for _ in range(sinks)} == {done - (sinks + window - 1)}
        query = torch.randn(1, 1, 4, generator=generator, dtype=torch.float64)
        positions = torch.arange(done + 1)
        mask = reference.reference_mask(positions[done:], positions, window, sinks)
        expected = reference.attention(query, dense[i], dense[i], mask)
        keys = reference.gather_pages(pool, table[i], length)
        assert torch.allclose(_attend(query, keys, window + sinks), expected)
    assert next(distances, None) is None


def test_decoding_rows_have_no_holes() -> None:
    """Entries below the window may be null or stale; nobody looks at them."""
    table = torch.tensor([[0, 0, 3, 4], [7, 8, 0, 0]], dtype=torch.int32)
    assert rows_with_holes(_batch([30, 9], [1, 1], table), 8, 8) == [False, False]
    assert rows_with_holes(_batch([30, 9], [1, 2], table), 8, 8) == [False, False]


@pytest.mark.parametrize("null_page", range(6))
def test_a_page_that_a_chunk_sees_and_that_is_not_stored_is_a_hole(null_page: int) -> None:
    """The chunk of positions 16 to 18 sees positions from 13 on, in pages 3 and 4."""
    table = torch.arange(1, 7, dtype=torch.int32)[None]
    table[0, null_page] = 0
    assert rows_with_holes(_batch([16], [3], table), 4, 4) == [null_page in (3, 4)]


def test_page_layout_refuses_what_is_not_a_place() -> None:
    def rounds(key: torch.Tensor, value: torch.Tensor, page: torch.Tensor, slots: Any) -> None:
        page[0] = torch.cat((key, value), dim=-1).transpose(0, 1) * 0

    with pytest.raises(
        RuntimeError, match=r"does not know on this processor; serve without sink_tokens"
    ):
        PageLayout((1, 2, 4), torch.float32, rounds)

    def mixes_heads(key: torch.Tensor, value: torch.Tensor, page: torch.Tensor, slots: Any) -> None:
        page[0] = torch.cat((key, value), dim=-1).transpose(0, 1)
        page[0, 1] = page[0, 1].flip(0)

    with pytest.raises(RuntimeError, match="does not know on this processor"):
        PageLayout((2, 2, 4), torch.float32, mixes_heads)

    def stores_elements_unevenly(
        key: torch.Tensor, value: torch.Tensor, page: torch.Tensor, slots: Any
    ) -> None:
        mixed = torch.cat((key, value), dim=-1)[:, :, [0, 1, 3, 2, 4, 5, 7, 6]]
        page[0] = mixed.transpose(0, 1)

    with pytest.raises(RuntimeError, match="does not know on this processor"):
        PageLayout((1, 2, 8), torch.float32, stores_elements_unevenly)

    def stores_elements_backwards(
        key: torch.Tensor, value: torch.Tensor, page: torch.Tensor, slots: Any
    ) -> None:
        page[0] = torch.cat((key.flip(2), value), dim=-1).transpose(0, 1)

    with pytest.raises(RuntimeError, match="does not know on this processor"):
        PageLayout((1, 2, 8), torch.float32, stores_elements_backwards)


@pytest.mark.parametrize(
    "loops",
    # Orders of (outer and inner token, outer and inner element), as vLLM's operators for vector
    # units, for AMX and for Neon's matrix unit have them; and token by token.
    [(2, 3, 0, 1), (2, 0, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3), (0, 1, 2, 3)],
)
@pytest.mark.parametrize("inner", [1, 2, 4])
def test_page_layout_knows_two_loops_of_tokens_and_of_elements(
    loops: tuple[int, ...], inner: int
) -> None:
    heads, block_size, head_size = 2, 8, 16

    def write(
        key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        sizes = (block_size // inner, inner, head_size // inner, inner)
        halves = pages.view(*pages.shape[:2], 2, -1)
        for half, states in enumerate((key, value)):
            order = loops if half == 0 else loops[::-1]
            stored = halves[:, :, half].view(*halves.shape[:2], *(sizes[i] for i in order))
            view = stored.permute(0, 1, *(2 + order.index(i) for i in range(4)))
            tokens = slots % block_size
            view[slots // block_size, :, tokens // inner, tokens % inner] = states.view(
                *states.shape[:2], *sizes[2:]
            )

    layout = PageLayout((heads, block_size, 2 * head_size), torch.float32, write)
    pages = torch.zeros(3, heads, block_size, 2 * head_size)
    slots = torch.tensor([23, 0, 9, 10])
    key, value = torch.randn(2, len(slots), heads, head_size)
    write(key, value, pages, slots)
    assert [x.tolist() for x in layout.read_tokens(pages, slots)] == [key.tolist(), value.tolist()]
    copy = torch.zeros_like(pages)
    layout.write(copy, layout.locate(slots), key, value)
    assert torch.equal(copy, pages)


@given(rows, st.data())
def test_chunks_are_divided_where_prompts_end(
    batch: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each token stays where it is, at its position and in its request's table."""
    computed, queries = (list(column) for column in zip(*batch, strict=True))
    prompt_lens = [data.draw(st.integers(1, c + n + 3)) for c, n in batch]
    table = torch.arange(len(batch), dtype=torch.int32)[:, None]
    given_batch = _batch(computed, queries, table)
    given_batch.rswa_prefix_lens = torch.tensor(prompt_lens, dtype=torch.int32)
    found, is_answer = split_at_prompt_ends(given_batch)
    tokens = []
    for row, sees_all in enumerate(is_answer):
        start, stop = found.query_start_loc[row : row + 2].tolist()
        assert 0 < stop - start <= found.max_query_len
        end = int(found.seq_lens[row])
        assert end <= found.max_seq_len
        request = int(found.block_table_tensor[row, 0])
        tokens += [(request, end - (stop - t), sees_all) for t in range(start, stop)]
    assert tokens == [
        (r, position, position >= prompt_lens[r])
        for r, (c, n) in enumerate(batch)
        for position in range(c, c + n)
    ]
    assert found.num_reqs == len(is_answer) <= 2 * len(batch)


def test_a_batch_without_lengths_of_prompts_counts_as_prompts() -> None:
    batch = _batch([3, 0], [1, 5], torch.zeros(2, 1, dtype=torch.int32))
    assert split_at_prompt_ends(batch) == (batch, [False, False])


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
def test_a_row_of_an_answer_names_the_keys_that_it_sees_and_no_others(
    window: int, page_size: int
) -> None:
    """Every place of the prompt's end and of the newest token in their pages.

    Each slot holds its token's position, or -1 where it was freed or never written.
    """
    prompts = range(1, 2 * page_size + 2)
    texts = [(p, p + window + n) for p in prompts for n in range(1, 2 * page_size + 2)]
    spare = pages.max_partial_tokens(page_size)
    width = pages.ceil_div(max(end for _, end in texts) + spare, page_size)
    generator = torch.Generator().manual_seed(window)
    # Every second row is one of full attention, to be left as it is.
    names = torch.randperm(2 * len(texts) * width, generator=generator) + 1
    table = names.view(-1, width).int()
    slots = np.full((len(names) + 1, page_size), -1)
    for row, (prompt_len, end) in enumerate(texts):
        own = np.arange(width * page_size)
        own[end:] = -1
        freed = pages.WindowPages(window, page_size, prompt_len).dead(end - 1)
        own[freed.start * page_size : freed.stop * page_size] = -1
        slots[table[2 * row]] = own.reshape(width, page_size)
    ends = [end for text in texts for end in (text[1], 1)]
    batch = _batch([end - 1 for end in ends], [1] * len(ends), table)
    before = batch.block_table_tensor.clone()
    rows = 2 * np.arange(len(texts))
    lens = np.array([prompt_len for prompt_len, _ in texts])
    found, sources, targets, _ = answer_tables(batch, rows, lens, window, page_size, {})
    assert torch.equal(batch.block_table_tensor, before)
    assert torch.equal(found.block_table_tensor[1::2], before[1::2])
    assert found.seq_lens[1::2].tolist() == [1] * len(texts)
    assert found.max_seq_len == int(found.seq_lens.max())
    may_write = {
        int(names.view(-1, width)[2 * row, place // page_size]) * page_size + place % page_size
        for row, (_, end) in enumerate(texts)
        for place in range(end, end + spare)
    }
    assert len(set(targets.tolist())) == len(targets)
    assert set(targets.tolist()) <= may_write
    slots.reshape(-1)[targets] = slots.reshape(-1)[sources]
    for row, (prompt_len, end) in enumerate(texts):
        keys = slots[found.block_table_tensor[2 * row]].reshape(-1)[: found.seq_lens[2 * row]]
        assert sorted(keys) == [
            key
            for key in range(end)
            if is_visible(end - 1, key, window, 0, Phase.DECODE, prompt_len)
        ]


class _Answering:
    """A request whose answer grows, on pages of a pool that others use too.

    A slot holds the number of the request and the position of the token that it stores, or -1.
    """

    def __init__(self, number: int, prompt_len: int, slots: np.ndarray, free: list[int]) -> None:
        self.number, self.prompt_len, self.end = number, prompt_len, prompt_len
        self.slots, self.free, self.table = slots, free, list[int]()

    def write(self, start: int, spare: int) -> None:
        """Store all tokens from ``start`` on, with slots behind them."""
        page_size = self.slots.shape[1]
        while len(self.table) * page_size < self.end + spare:
            self.table.append(self.free.pop())
        for position in range(start, self.end):
            page = self.table[position // page_size]
            self.slots[page, position % page_size] = 10_000 * self.number + position

    def give_back(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index < len(self.table) and self.table[index]:
                self.slots[self.table[index]] = -1
                self.free.append(self.table[index])
                self.table[index] = 0

    def start_over(self, spare: int) -> None:
        self.give_back(range(len(self.table)))
        self.table.clear()
        self.write(0, spare)


@pytest.mark.parametrize("page_size", [2, 4, 8])
@pytest.mark.parametrize("window", [1, 3, 4, 8, 9, 20])
def test_what_is_copied_in_one_step_serves_the_next(window: int, page_size: int) -> None:
    """Whatever comes between: several tokens, rejected ones, a rest, or another's pages."""
    pick, spare = random.Random(window), pages.max_partial_tokens(page_size)
    slots, free = np.full((400, page_size), -1), list(range(1, 400))
    num_copied = num_rows = 0
    requests = [_Answering(i, pick.randint(1, 3 * page_size), slots, free) for i in range(5)]
    for request in requests:
        request.write(0, spare)
    ends: dict[int, int] = {}
    for _ in range(300):
        rows, rejected = [], []
        for request in requests:
            request.give_back(
                pages.WindowPages(window, page_size, request.prompt_len).dead(request.end)
            )
            action = pick.choice(["one"] * 12 + ["several", "rest", "preempted"])
            if action == "preempted":
                request.start_over(spare)
            elif action != "rest":
                before, num_tokens = request.end, 1 if action == "one" else pick.randint(2, 4)
                request.end += num_tokens
                request.write(before, spare)
                if action == "several":
                    rejected.append((request, pick.randrange(num_tokens)))
                elif request.end - window > request.prompt_len:
                    rows.append(request)
            if request.end > 200:
                request.prompt_len = request.end = pick.randint(1, 3 * page_size)
                request.start_over(spare)
                rows = [row for row in rows if row is not request]
                rejected = [item for item in rejected if item[0] is not request]
        if not rows:
            ends = {}
        else:
            width = max(len(request.table) for request in rows)
            tables = [request.table + [0] * (width - len(request.table)) for request in rows]
            batch = _batch(
                [request.end - 1 for request in rows],
                [1] * len(rows),
                torch.tensor(tables, dtype=torch.int32),
            )
            lens = np.array([request.prompt_len for request in rows])
            found, sources, targets, ends = answer_tables(
                batch, np.arange(len(rows)), lens, window, page_size, ends
            )
            flat = slots.reshape(-1)
            flat[targets] = flat[sources]
            num_copied, num_rows = num_copied + len(sources), num_rows + len(rows)
            for row, request in enumerate(rows):
                keys = slots[found.block_table_tensor[row]].reshape(-1)[: found.seq_lens[row]]
                assert sorted(keys - 10_000 * request.number) == [
                    key
                    for key in range(request.end)
                    if is_visible(request.end - 1, key, window, 0, Phase.DECODE, request.prompt_len)
                ]
        for request, num_rejected in rejected:
            request.end -= num_rejected
    # A page of the window and the prompt's end once a page, and where something came between.
    if window > page_size:
        assert num_copied < 4 * num_rows
