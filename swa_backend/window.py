"""The definition of the attention window, as pure integer functions.

Everything else in this project (mask, page arithmetic, kernels, tests) follows this page.

A window of ``W`` means that the query at position ``q`` sees the key at position ``k`` iff
``0 <= q - k < W``: ``W`` keys, the token itself included. This is Hugging Face's rule
(``kv_idx > q_idx - W``). ``S`` sink tokens stay visible to every later query: the visible set is
``sinks | window``, each key once. ``window=None`` means full causal attention.
"""


def is_visible(query: int, key: int, window: int | None, sink_tokens: int = 0) -> bool:
    """Whether the query at position ``query`` sees the key at position ``key``."""
    if key < 0 or key > query:
        return False
    return window is None or query - key < window or key < sink_tokens


def first_visible(query: int, window: int | None) -> int:
    """Give the lowest position inside the window of the query at ``query``, sinks aside."""
    return 0 if window is None else max(0, query - window + 1)


def num_visible(query: int, window: int | None, sink_tokens: int = 0) -> int:
    """Count the keys that the query at ``query`` sees; a sink inside the window counts once."""
    first = first_visible(query, window)
    return query + 1 - first + min(sink_tokens, first)


def last_unshifted(window: int, sink_tokens: int) -> int:
    """Give the last position whose query sees every key before it.

    With position shift, a query beyond it meets the sinks as if it stood at this position
    (StreamingLLM's cache-relative positions, https://arxiv.org/abs/2309.17453).
    """
    return sink_tokens + window - 1


def flash_attention_window(window: int | None) -> tuple[int, int]:
    """Convert to FlashAttention's ``(left, right)``: keys before and after the query's own."""
    return (-1, -1) if window is None else (window - 1, 0)


def flashinfer_window_left(window: int | None) -> int:
    """Convert to FlashInfer's ``window_left``: keys before the query's own, -1 for all."""
    return -1 if window is None else window - 1
