"""Counters of the page managers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageCounts:
    """What one KV group's manager did with its pages since the engine started.

    Attributes:
        allocated: pages taken from the pool for new tokens (prefix hits are not counted).
        skipped: pages that prefill chunks passed over without storing them.
        freed_by_window: pages given back because no later token can see them.
        live: pages held by requests now; a page shared by two requests counts for each.
        peak_live_per_request: most pages one request held after an allocation.
        prefix_lost_tokens: prompt tokens computed again because pages that would have served them
            from the prefix cache had been skipped.
    """

    allocated: int
    skipped: int
    freed_by_window: int
    live: int
    peak_live_per_request: int
    prefix_lost_tokens: int
