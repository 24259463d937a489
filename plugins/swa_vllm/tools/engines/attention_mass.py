"""Attention mass beyond windows: what each layer of a full-attention engine would lose by them.

As DuoAttention and SWAA find the layers that need the whole text: one pass, no window served.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from swa_vllm.tools.engines.scoring import ScoringEngine

_MOST_QUERIES = 256  # of a text, spread evenly: more change no order of layers


@dataclass(frozen=True)
class Text:
    """A text whose attention is looked at.

    Attributes:
        first: the first position whose query counts.
        pinned: leading tokens that no window hides here.
    """

    tokens: Sequence[int]
    first: int
    pinned: int = 0


def measure_attention_mass(
    engine: ScoringEngine,
    texts: Sequence[Text],
    windows: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], list[float]]:
    """Measure which part of a layer's attention goes to keys that a window hides.

    Args:
        engine: with full attention in all layers.
        windows: windows and sinks.

    Returns:
        By window and sinks, a part from 0 to 1 for each layer: the mean over heads and queries.
    """
    assert engine.llm is not None
    modules: list[Attention] = engine.llm.apply_model(_attention_modules)[0]
    layers = [_Layer(module, windows) for module in modules]
    hooks = [
        module.register_forward_pre_hook(layer.take_step)
        for module, layer in zip(modules, layers, strict=True)
    ]
    try:
        for text in texts:
            length = len(text.tokens)
            step = max(1, (length - text.first) // _MOST_QUERIES)
            for layer in layers:
                layer.begin(range(text.first, length, step), text.pinned)
            engine.score(text.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        window: [float(layer.mass[index]) / layer.num_queries for layer in layers]
        for index, window in enumerate(windows)
    }


def _attention_modules(model: torch.nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


class _Layer:
    """The keys of a text in a layer, and the mass that windows hide, summed over queries."""

    def __init__(self, module: Attention, windows: Sequence[tuple[int, int]]) -> None:
        self._num_heads, self._num_kv_heads = module.num_heads, module.num_kv_heads
        self._scale: float = module.impl.scale
        self._windows = windows
        self.mass = torch.zeros(len(windows), dtype=torch.float64)
        self.num_queries = 0

    def begin(self, queries: range, pinned: int) -> None:
        """Begin a text, served alone, of which the queries at these positions count."""
        self._queries, self._pinned, self._keys = queries, pinned, list[torch.Tensor]()

    def take_step(self, module: Attention, inputs: tuple[Any, ...]) -> None:
        """Look at the queries and keys of a step; a forward pre-hook of torch."""
        query, key = inputs[:2]
        first = sum(len(keys) for keys in self._keys)
        self._keys.append(key.view(len(key), self._num_kv_heads, -1).float())
        chosen = [n - first for n in self._queries if first <= n < first + len(query)]
        if not chosen:
            return
        keys = torch.cat(self._keys)  # [keys, KV heads, head_dim]
        queries = query.view(len(query), self._num_heads, -1)[chosen].float()
        keys = keys.repeat_interleave(self._num_heads // self._num_kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->qhk", queries, keys) * self._scale
        at = torch.tensor(chosen, device=key.device)[:, None] + first  # [queries, 1]
        place = torch.arange(len(keys), device=key.device)[None]
        scores.masked_fill_((place > at)[:, None], float("-inf"))
        weights = scores.softmax(-1).mean(1)  # [queries, keys]
        for index, (window, sinks) in enumerate(self._windows):
            hidden = (at - place >= window) & (place >= max(sinks, self._pinned))
            self.mass[index] += float((weights * hidden).sum())
        self.num_queries += len(chosen)
