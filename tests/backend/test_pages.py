"""Page arithmetic against the definition of the window, by brute force."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_backend.pages import WindowPages, ceil_div, max_pages_spanned
from swa_backend.window import is_visible

rules = st.builds(
    WindowPages,
    window=st.integers(1, 80),
    page_size=st.sampled_from([1, 2, 16, 32]),
    sink_tokens=st.sampled_from([0, 0, 1, 4, 17, 33]),
    rollback_tokens=st.sampled_from([0, 0, 1, 5, 20]),
)


def _is_seen(pages: WindowPages, page: int, first_query: int) -> bool:
    """Whether a query from ``first_query`` on sees a key of ``page`` that lies before it."""
    keys = range(page * pages.page_size, (page + 1) * pages.page_size)
    queries = range(first_query, first_query + 2 * pages.page_size)
    return any(
        k < first_query and is_visible(q, k, pages.window, pages.sink_tokens)
        for q in queries
        for k in keys
    )


@given(rules, st.integers(0, 300))
def test_dead_pages_are_those_no_later_query_sees(pages: WindowPages, computed: int) -> None:
    full = range(computed // pages.page_size)
    dead = [page for page in full if not _is_seen(pages, page, computed)]
    assert [page for page in full if page in pages.dead(computed)] == dead


@given(rules, st.integers(1, 300), st.data())
def test_holes_are_seen_by_no_query_that_may_come_next(
    pages: WindowPages, num_tokens: int, data: st.DataObject
) -> None:
    num_pages = data.draw(st.integers(0, ceil_div(num_tokens, pages.page_size)))
    holes = pages.holes(num_pages, num_tokens)
    for rejected in range(min(pages.rollback_tokens, num_tokens) + 1):
        assert not any(_is_seen(pages, page, num_tokens - rejected) for page in holes)
    assert all(num_pages <= page < num_tokens // pages.page_size for page in holes)


@given(rules, st.integers(1, 300))
def test_text_that_comes_again_finds_the_pages_a_hit_needs(
    pages: WindowPages, num_tokens: int
) -> None:
    """vLLM serves all but the last token from the cache, in whole pages, with a window below."""
    hit = (num_tokens - 1) // pages.page_size
    needed = range(max(0, hit - ceil_div(pages.window - 1, pages.page_size)), hit)
    assert not set(needed) & set(pages.holes(0, num_tokens))


@pytest.mark.parametrize("num_tokens", range(6))
def test_span(num_tokens: int) -> None:
    spans = [
        len({position // 3 for position in range(start, start + num_tokens)}) for start in range(3)
    ]
    assert max_pages_spanned(num_tokens, 3) == max(spans)


def _held_by_brute_force(pages: WindowPages, num_steps: int, chunk: int) -> int:
    """Most pages held over every settled position and every length of the chunks in flight."""

    @cache
    def taken(computed: int, steps: int) -> int:
        if steps == 0:
            return 0
        num_pages = ceil_div(computed, pages.page_size)
        return max(
            ceil_div(end, pages.page_size)
            - num_pages
            - len(pages.holes(num_pages, end))
            + taken(end, steps - 1)
            for end in range(computed + 1, computed + chunk + 1)
        )

    start = pages.window + pages.page_size
    return max(
        ceil_div(settled, pages.page_size)
        - len(pages.dead(settled))
        + max(taken(settled, steps) for steps in range(num_steps + 1))
        for settled in range(start, start + pages.page_size)
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 8])
def test_cap_is_the_exact_maximum(page_size: int, num_steps: int) -> None:
    for window in [*range(2 if page_size == 1 else 1, 20), 31, 32, 33]:
        pages = WindowPages(window, page_size)
        for chunk in [*range(1, 2 * page_size + 3), window, window + page_size, 3 * window + 1]:
            expected = _held_by_brute_force(pages, num_steps, chunk)
            assert pages.max_held(num_steps, num_steps * chunk) == expected, (window, chunk)


@pytest.mark.parametrize(
    ("window", "chunk", "cap"), [(64, 8192, 6), (512, 8192, 34), (1024, 2048, 66), (1024, 8192, 66)]
)
def test_cap_of_known_configurations(window: int, chunk: int, cap: int) -> None:
    assert WindowPages(window, 32).max_held(1, chunk) == cap


def test_decoding_holds_its_window() -> None:
    for window in range(1, 40):
        pages = WindowPages(window, 4)
        held = [query // 4 + 1 - pages.first_live(query) for query in range(200)]
        assert max(held) == pages.max_survivors == ceil_div(window - 1, 4) + 1


def test_sinks_stay_and_are_held_besides_the_window() -> None:
    pages = WindowPages(window=8, page_size=4, sink_tokens=5)
    assert pages.num_sink_pages == 2
    assert pages.dead(100) == range(2, 23)
    assert pages.holes(0, 100) == range(2, 22)
    assert pages.max_held(1, 400) == 2 + WindowPages(8, 4).max_held(1, 400)
