"""Lost prefix cache hits, against the definition of a hit by brute force."""

from hypothesis import given
from hypothesis import strategies as st

from swa_backend.lost_prefix import SkippedPages


def _longest_hit(is_stored: list[bool], num_needed: int) -> int:
    """Most pages of a hit: those below its end are stored, as many as it needs or all."""
    return max(
        end
        for end in range(len(is_stored) + 1)
        if end == 0 or (is_stored[end - 1] and all(is_stored[max(0, end - num_needed) : end]))
    )


@given(
    st.lists(st.sampled_from(["cached", "skipped", "gone"]), max_size=9),
    st.integers(0, 4),
    st.data(),
)
def test_lost_is_what_a_hit_would_have_had_with_what_was_skipped(
    pages: list[str], num_needed: int, data: st.DataObject
) -> None:
    skipped = SkippedPages(100)
    skipped.add([i for i, kind in enumerate(pages) if kind == "skipped"])
    cached = [kind == "cached" for kind in pages]
    # Other kinds of layers may have had less.
    num_hit = data.draw(st.integers(0, _longest_hit(cached, num_needed)))
    possible = _longest_hit([kind != "gone" for kind in pages], num_needed)
    expected = max(0, possible - num_hit) if "skipped" in pages[num_hit:] else 0
    found = skipped.num_lost(range(len(pages)), num_hit, num_needed, cached.__getitem__)
    assert found == expected


def test_pages_that_were_skipped_last_are_remembered() -> None:
    skipped = SkippedPages(3)

    def known() -> list[int]:
        return [
            page for page in range(1, 9) if skipped.num_lost([page], 0, 1, lambda _: False) == 1
        ]

    skipped.add([1, 2, 3])
    assert known() == [1, 2, 3]
    skipped.add([1, 4])  # 1 again, so 2 is the oldest
    assert known() == [1, 3, 4]
    skipped.add([5, 6, 7, 8])
    assert known() == [6, 7, 8]
