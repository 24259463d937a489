"""What skipping pages costs the prefix cache: pages that would have been hit, had they been stored.

A list of ghost entries, as adaptive caches keep them (Megiddo and Modha, ARC, FAST 2003): the
hashes of skipped pages are remembered, as many as the pool could have held, and looked up when a
prompt comes that was not fully served.
"""

from collections.abc import Callable, Hashable, Sequence


class SkippedPages:
    """Remembers the hashes of the pages that were skipped last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: dict[Hashable, None] = {}

    def add(self, hashes: Sequence[Hashable]) -> None:
        """Remember pages that were not stored."""
        for page_hash in hashes:
            self._hashes.pop(page_hash, None)
            self._hashes[page_hash] = None
        while len(self._hashes) > self._capacity:
            del self._hashes[next(iter(self._hashes))]

    def num_lost(
        self,
        hashes: Sequence[Hashable],
        num_hit: int,
        num_needed: int,
        is_cached: Callable[[Hashable], bool],
    ) -> int:
        """Count the pages by which a hit would have been longer, had no page been skipped.

        An upper bound: the pool might have reused a page by now, the cache might have been reset,
        and in a model with other kinds of layers those may not have had the prefix either.

        Args:
            hashes: hashes of the prompt's pages that may be hit, in the order of positions.
            num_hit: how many of them were hit.
            num_needed: pages in a row that a hit needs below its end.
            is_cached: whether the prefix cache holds a page.
        """
        if not any(page_hash in self._hashes for page_hash in hashes[num_hit:]):
            return 0
        run = 0
        for index in range(len(hashes) - 1, -1, -1):
            stored = hashes[index] in self._hashes or is_cached(hashes[index])
            run = run + 1 if stored else 0
            if run and (run >= num_needed or index == 0):
                return max(0, index + run - num_hit)
        return 0
