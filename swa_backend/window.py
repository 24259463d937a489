"""The definition of the attention window, as pure integer functions.

Everything else in this project (mask, page arithmetic, kernels, tests) follows this page.

A window of ``W`` means that the query at position ``q`` sees the key at position ``k`` iff
``0 <= q - k < W``: ``W`` keys, the token itself included. This is Hugging Face's rule
(``kv_idx > q_idx - W``). ``S`` sink tokens stay visible to every later query: the visible set is
``sinks | window``, each key once. ``window=None`` means full causal attention.

A :class:`Phase` lets the window rule a part of a text only. What a query sees then depends on its
position and on the length ``P`` of the prompt, never on the step that computes it: a request that
is computed again, or in other chunks, sees the same. The first generated token is predicted by the
query at ``P - 1``, which belongs to the prompt.
"""

from enum import StrEnum


class Phase(StrEnum):
    """Whose queries have the window.

    ``BOTH``: the prompt's and the generated tokens'. ``PREFILL``: the prompt's alone; a generated
    token sees everything. ``DECODE``: the generated tokens' alone, which see the whole prompt too;
    the prompt's queries see everything before them.
    """

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


def is_visible(
    query: int,
    key: int,
    window: int | None,
    sink_tokens: int = 0,
    phase: Phase = Phase.BOTH,
    prompt_len: int = 0,
) -> bool:
    """Whether the query at position ``query`` sees the key at position ``key``.

    Args:
        prompt_len: tokens of the prompt, which matters where ``phase`` is not ``BOTH``.
    """
    if key < 0 or key > query:
        return False
    return (
        window is None
        or query - key < window
        or key < sink_tokens
        or (phase is Phase.PREFILL and query >= prompt_len)
        or (phase is Phase.DECODE and key < prompt_len)
    )


def has_window(query: int, phase: Phase, prompt_len: int) -> bool:
    """Whether the window rules the query at ``query``, or it sees everything before it."""
    if phase is Phase.BOTH:
        return True
    return (query < prompt_len) == (phase is Phase.PREFILL)


def first_visible(
    query: int, window: int | None, phase: Phase = Phase.BOTH, prompt_len: int = 0
) -> int:
    """Give the lowest position inside the window of the query at ``query``, sinks aside."""
    if window is None or not has_window(query, phase, prompt_len):
        return 0
    return max(0, query - window + 1)


def num_pinned(sink_tokens: int, phase: Phase = Phase.BOTH, prompt_len: int = 0) -> int:
    """Count the leading tokens that stay visible below the window: the sinks, or the prompt."""
    return max(sink_tokens, prompt_len) if phase is Phase.DECODE else sink_tokens


def num_visible(
    query: int,
    window: int | None,
    sink_tokens: int = 0,
    phase: Phase = Phase.BOTH,
    prompt_len: int = 0,
) -> int:
    """Count the keys that the query at ``query`` sees; a sink inside the window counts once."""
    first = first_visible(query, window, phase, prompt_len)
    return query + 1 - first + min(num_pinned(sink_tokens, phase, prompt_len), first)


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
