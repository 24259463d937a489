"""The definition of the window, and the reference attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_sliding_window_causal_mask,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from swa_backend import pages, reference, window

positions = st.integers(0, 300)
windows = st.one_of(st.none(), st.integers(1, 80))
phases = st.sampled_from(list(window.Phase))
page_sizes = st.sampled_from([1, 2, 16, 32])


@given(positions, windows, st.integers(0, 8), phases, positions)
def test_num_visible_counts_is_visible(
    query: int, size: int | None, sinks: int, phase: window.Phase, prompt_len: int
) -> None:
    by_prompt = phase, prompt_len
    visible = [k for k in range(query + 5) if window.is_visible(query, k, size, sinks, *by_prompt)]
    assert len(visible) == window.num_visible(query, size, sinks, *by_prompt)
    first = window.first_visible(query, size, *by_prompt)
    pinned = range(min(window.num_pinned(sinks, *by_prompt), first))
    assert visible == [*pinned, *range(first, query + 1)]
    if not sinks and phase is window.Phase.BOTH:
        assert len(visible) == window.num_visible(query, size)
        assert visible[0] == window.first_visible(query, size)


@pytest.mark.parametrize(
    ("phase", "of_prompt", "of_generated"),
    [(window.Phase.BOTH, 6, 17), (window.Phase.PREFILL, 6, 0), (window.Phase.DECODE, 0, 17)],
)
def test_a_phase_says_whose_queries_have_the_window(
    phase: window.Phase, of_prompt: int, of_generated: int
) -> None:
    """A window of 4 behind a prompt of 10 tokens."""
    assert window.first_visible(9, 4, phase, 10) == of_prompt
    assert window.first_visible(10, 4, phase, 10) == (7 if of_generated else 0)
    assert window.first_visible(20, 4, phase, 10) == of_generated


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), phases, st.integers(0, 45))
def test_mask_of_a_phase_equals_hugging_faces_masks_combined(
    num_tokens: int, size: int, sinks: int, phase: window.Phase, prompt_len: int
) -> None:
    """From transformers' masks of causal and sliding attention, and one of the prompt alone."""
    always = {
        window.Phase.BOTH: lambda batch, head, query, key: key < sinks,
        window.Phase.PREFILL: lambda batch, head, query, key: (key < sinks) | (query >= prompt_len),
        window.Phase.DECODE: lambda batch, head, query, key: (key < sinks) | (key < prompt_len),
    }[phase]
    expected = eager_mask(
        batch_size=1,
        q_length=num_tokens,
        kv_length=num_tokens,
        mask_function=and_masks(
            causal_mask_function, or_masks(sliding_window_overlay(size), always)
        ),
    )
    every = torch.arange(num_tokens)
    mask = reference.reference_mask(every, every, size, sinks, phase, prompt_len)
    assert torch.equal(mask, expected[0, 0] == 0)


@given(st.integers(1, 80), st.integers(0, 8))
def test_last_unshifted_is_the_last_that_sees_everything(size: int, sinks: int) -> None:
    last = window.last_unshifted(size, sinks)
    assert window.num_visible(last, size, sinks) == last + 1
    assert window.num_visible(last + 1, size, sinks) == last + 1


@pytest.mark.parametrize(
    ("query", "key", "visible"),
    [
        (10, 10, True),
        (10, 7, True),
        (10, 6, False),
        (10, 11, False),
        (2, 0, True),
        (10, 0, False),
        (10, -1, False),
    ],
)
def test_window_of_four(query: int, key: int, visible: bool) -> None:
    assert window.is_visible(query, key, 4) is visible


def test_other_libraries_spell_the_same_window() -> None:
    assert window.flash_attention_window(4096) == (4095, 0)
    assert window.flash_attention_window(None) == (-1, -1)
    assert window.flashinfer_window_left(4096) == 4095
    assert window.flashinfer_window_left(None) == -1


@pytest.mark.parametrize(("size", "query_len", "key_len"), [(1, 4, 4), (5, 12, 12), (64, 9, 9)])
def test_mask_equals_hugging_face(size: int, query_len: int, key_len: int) -> None:
    config = Qwen3Config(use_sliding_window=True, sliding_window=size, max_window_layers=0)
    config._attn_implementation = "eager"
    expected = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, query_len, 8),
        attention_mask=None,
        past_key_values=None,
    )
    mask = reference.sliding_window_mask_4d(query_len, key_len, size)
    assert torch.equal(mask, expected.expand_as(mask))


@pytest.mark.parametrize(("size", "query_len", "key_len"), [(4, 1, 9), (5, 3, 20), (40, 8, 30)])
def test_mask_of_a_chunk_equals_hugging_face(size: int, query_len: int, key_len: int) -> None:
    """The last queries of a text whose earlier keys are cached."""
    expected = eager_mask(
        batch_size=1,
        q_length=query_len,
        kv_length=key_len,
        q_offset=key_len - query_len,
        mask_function=sliding_window_causal_mask_function(size),
    )
    assert torch.equal(reference.sliding_window_mask_4d(query_len, key_len, size), expected)


def test_mask_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match=r"query_len must lie in 0\.\.key_len=3, got 4"):
        reference.sliding_window_mask_4d(4, 3, 2)


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(0, 999))
def test_dense_slice_paged_window_and_full_mask_agree(
    num_tokens: int, size: int, page_size: int, seed: int
) -> None:
    """Attention of the last token, with everything below the window gone or poisoned."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, 1, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, num_tokens, 8, generator=generator, dtype=torch.float64)
    last = num_tokens - 1
    everything = torch.arange(num_tokens)
    at_last = torch.tensor([last])
    mask = reference.reference_mask(at_last, everything, size)
    expected = reference.attention(query, key, value, mask)

    past = reference.slice_cache(key[:, :last], value[:, :last], size)
    sliced = [torch.cat([p, x[:, last:]], dim=1) for p, x in zip(past, (key, value), strict=True)]
    seen = torch.ones(1, sliced[0].shape[1], dtype=torch.bool)
    assert torch.allclose(reference.attention(query, *sliced, seen), expected)

    # Pages in random order; those that died before this step are overwritten.
    num_pages = pages.ceil_div(num_tokens, page_size)
    table = torch.randperm(num_pages, generator=generator)
    paged = []
    for dense in (key, value):
        padded = torch.zeros(2, num_pages * page_size, 8, dtype=torch.float64)
        padded[:, :num_tokens] = dense
        pool = torch.empty(num_pages, 2, page_size, 8, dtype=torch.float64)
        pool[table] = padded.unflatten(1, (num_pages, page_size)).transpose(0, 1)
        pool[table[: pages.WindowPages(size, page_size).first_live(last)]] = float("nan")
        paged.append(reference.gather_pages(pool, table, num_tokens))
    assert torch.allclose(reference.attention(query, *paged, mask), expected)


def test_row_that_sees_nothing_gives_zeros() -> None:
    query, key = torch.ones(2, 1, 4), torch.ones(1, 3, 4)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.equal(reference.attention(query, key, key, mask), torch.zeros(2, 1, 4))


def test_sinks_stay_visible_once() -> None:
    mask = reference.reference_mask(torch.tensor([1, 9]), torch.arange(10), 3, sink_tokens=2)
    assert mask[0].nonzero().flatten().tolist() == [0, 1]
    assert mask[1].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]
