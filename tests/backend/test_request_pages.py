"""Pages counted from sizes alone, against a block table that is filled and emptied page by page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_backend.pages import WindowPages
from swa_backend.request_pages import PagePolicy, RequestPages

windows = st.none() | st.builds(
    WindowPages,
    window=st.integers(1, 40),
    page_size=st.just(4),
    sink_tokens=st.sampled_from([0, 0, 1, 9]),
    rollback_tokens=st.sampled_from([0, 5]),
)
policies = st.builds(
    PagePolicy,
    page_size=st.just(4),
    window=windows,
    stores_all=st.booleans(),
    spare_tokens=st.sampled_from([0, 0, 1, 9]),
    frees_by_schedule=st.booleans(),
)
# Of each step: tokens that it computes, and tokens of earlier steps that are settled before it.
steps = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=12)


class Table:
    """Whether each entry of a request's block table holds a page."""

    def __init__(self, policy: PagePolicy) -> None:
        self.policy = policy
        self.held: list[bool] = []

    def settle(self, num_settled: int, num_scheduled: int) -> int:
        """Give back what the window has left; returns how many pages."""
        before = sum(self.held)
        if self.policy.window is not None:
            rolled_back = num_scheduled - self.policy.window.rollback_tokens
            if self.policy.frees_by_schedule and rolled_back > num_settled:
                num_settled = rolled_back
            for index in self.policy.window.dead(num_settled):
                if index < len(self.held):
                    self.held[index] = False
        return before - sum(self.held)

    def take(self, num_tokens: int) -> int:
        """Allocate what a step ending before ``num_tokens`` stores; returns how many pages."""
        window, start = self.policy.window, len(self.held)
        stop = -(-(num_tokens + self.policy.spare_tokens) // 4)
        holes = window.holes(start, num_tokens) if window and not self.policy.stores_all else ()
        new = [index not in holes for index in range(start, stop)]
        self.held += new
        return sum(new)


@given(policies, steps)
def test_pages_are_those_of_a_block_table(policy: PagePolicy, sizes: list[tuple[int, int]]) -> None:
    table, pages = Table(policy), RequestPages(policy)
    num_tokens = num_settled = 0
    for num_new, num_more_settled in sizes:
        num_settled = min(num_tokens, num_settled + num_more_settled)
        settled = (num_settled, num_tokens)
        assert pages.settle(*settled) == table.settle(*settled)
        num_tokens += num_new
        num_missing = pages.missing(num_tokens)
        pages.take(num_tokens)
        assert num_missing == table.take(num_tokens)
        assert pages.live == sum(table.held)
        assert pages.missing(num_tokens) == 0
        pages.take(num_tokens)
        assert pages.live == sum(table.held)


@pytest.mark.parametrize(
    ("cap", "num_tokens", "charge"), [(None, 40, 11), (11, 40, 11), (3, 40, 3), (3, 7, 2)]
)
def test_admission_charges_entries_up_to_the_cap(
    cap: int | None, num_tokens: int, charge: int
) -> None:
    """With one slot behind the newest token."""
    assert PagePolicy(4, spare_tokens=1, cap=cap).charge(num_tokens) == charge
