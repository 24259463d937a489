"""Counts of the page managers, and the Prometheus metrics that show them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PageCounts:
    """What one KV group's manager holds, and what it did since the engine started.

    Attributes:
        allocated: pages taken from the pool for new tokens (prefix hits are not counted).
        skipped: pages that prefill chunks passed over without storing them.
        freed_by_window: pages given back because no later token can see them.
        prefix_hit_tokens: prompt tokens that the prefix cache served.
        prefix_lost_tokens: prompt tokens computed again because pages that would have served them
            from the prefix cache had been skipped.
        live_window: pages held now that are no more than decoding needs; see
            :meth:`swa_backend.pages.WindowPages.kinds`. A live page of any kind that two requests
            share counts twice.
        live_sink: pages held now for sink tokens.
        live_prompt: pages held now for prompts, of which answers see all (phase "decode").
        live_prefill: pages held now beyond both, for chunks, steps in flight and the prefix cache.
        reserved: most pages that the live requests could hold, were each of max_model_len.
        requests_live: requests that hold pages now.
        peak_live_per_request: most pages one request held after an allocation.
        window_tokens: tokens a query sees, itself included.
        sink_tokens: leading tokens that every query sees.
    """

    allocated: int = 0
    skipped: int = 0
    freed_by_window: int = 0
    prefix_hit_tokens: int = 0
    prefix_lost_tokens: int = 0
    live_window: int = 0
    live_sink: int = 0
    live_prompt: int = 0
    live_prefill: int = 0
    reserved: int = 0
    requests_live: int = 0
    peak_live_per_request: int = 0
    window_tokens: int = 0
    sink_tokens: int = 0

    @property
    def live(self) -> int:
        """Pages held by requests now."""
        return self.live_window + self.live_sink + self.live_prompt + self.live_prefill


@dataclass(frozen=True)
class Metric:
    """A Prometheus metric, or one kind of it.

    All have the label ``engine``, and those of :data:`METRICS` the label ``group`` too.

    Attributes:
        name: the metric's name; samples of a counter add ``_total``.
        kind: value of the label ``kind``, for metrics that have it.
    """

    name: str
    type: Literal["counter", "gauge"]
    help: str
    kind: str | None = None

    @property
    def sample(self) -> str:
        """Name of the metric's samples."""
        return f"{self.name}_total" if self.type == "counter" else self.name


_LIVE = (
    "KV pages that requests hold now, by what for: the window, sink tokens, the prompt, or beyond "
    "these a prefill chunk, steps in flight and the prefix cache."
)
# Keys are the fields of PageCounts that the metrics show.
METRICS = {
    "allocated": Metric(
        "swa_pages_allocated", "counter", "KV pages taken from the pool for new tokens."
    ),
    "skipped": Metric(
        "swa_pages_skipped",
        "counter",
        "KV pages that prefill never allocated because no later token sees them.",
    ),
    "freed_by_window": Metric(
        "swa_pages_freed",
        "counter",
        "KV pages given back because they left the window of a live request.",
    ),
    "prefix_hit_tokens": Metric(
        "swa_prefix_hit_tokens",
        "counter",
        "Prompt tokens served from the prefix cache; again when a preempted request resumes.",
    ),
    "prefix_lost_tokens": Metric(
        "swa_prefix_lost_tokens",
        "counter",
        "Prompt tokens computed that skipped pages would have served (an upper bound).",
    ),
    "live_window": Metric("swa_pages_live", "gauge", _LIVE, "window"),
    "live_sink": Metric("swa_pages_live", "gauge", _LIVE, "sink"),
    "live_prompt": Metric("swa_pages_live", "gauge", _LIVE, "prompt"),
    "live_prefill": Metric("swa_pages_live", "gauge", _LIVE, "prefill"),
    "reserved": Metric(
        "swa_pages_reserved",
        "gauge",
        "Most KV pages that the live requests could hold, were each of max_model_len.",
    ),
    "requests_live": Metric("swa_requests_live", "gauge", "Requests that hold KV pages now."),
    "peak_live_per_request": Metric(
        "swa_pages_peak_per_request", "gauge", "Most KV pages that one request has held."
    ),
    "window_tokens": Metric(
        "swa_window_tokens", "gauge", "Tokens that a query of this group sees, itself included."
    ),
    "sink_tokens": Metric(
        "swa_sink_tokens", "gauge", "First tokens of a text that every query of this group sees."
    ),
}
# Of each engine of a server, whether a scrape has the metrics above.
ENGINE_SCRAPED = Metric(
    "swa_engine_scraped",
    "gauge",
    "1 if this scrape has the counts of this engine; 0 if not, because it runs on another machine, "
    "has not started yet, or has ended.",
)
# Of each engine of a server, the options that it has: 1, with these labels beside ``engine``.
OPTIONS_INFO = Metric(
    "swa_options_info",
    "gauge",
    "1; the labels are the version of the plugin and what it serves.",
)
OPTION_LABELS = ("version", "window", "sink_tokens", "phase", "sliding_layers", "full_layers")
