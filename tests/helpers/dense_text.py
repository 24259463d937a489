"""Log-probabilities of long texts: Qwen3 with windows and sinks, dense, all queries at once.

Weights, norms, MLP and rotary frequencies are Hugging Face's. A part of a text is enough where
what it leaves out is not seen: tokens come with their positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.helpers.dense_qwen3 import Sight, keep_dtype_in_norms
from tests.helpers.tiny_models import OracleScores


class DenseText:
    """In one dtype; ``overrides`` are keys of the config.

    With an ``order``, a seed, hidden units and neurons lie in another order: the same function,
    whose sums are rounded otherwise.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, order: int | None = None, **overrides: Any
    ) -> None:
        config = Qwen3Config.from_pretrained(directory, **overrides)
        self._model: Any = Qwen3ForCausalLM.from_pretrained(directory, config=config, dtype=dtype)
        self._model.eval()
        if dtype == torch.float64:
            keep_dtype_in_norms(self._model)
        if order is not None:
            _reorder(self._model, torch.Generator().manual_seed(order))

    @property
    def num_layers(self) -> int:
        return int(self._model.config.num_hidden_layers)

    def logprobs(
        self, tokens: Sequence[int], positions: Sequence[int], sight: Sight
    ) -> torch.Tensor:
        """Of every token but the first, float64."""
        scores = self.scores(tokens, positions, sight)[:-1]
        return scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    @torch.inference_mode()
    def scores(self, tokens: Sequence[int], positions: Sequence[int], sight: Sight) -> torch.Tensor:
        """Log-probabilities of what follows each token, float64 ``[num_tokens, vocab]``."""
        at, model = torch.tensor(positions), self._model.model
        hidden = model.embed_tokens(torch.tensor(tokens))
        for layer, window in zip(model.layers, sight.windows, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attention(layer.self_attn, normed, at, window, sight)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: torch.Tensor = self._model.lm_head(model.norm(hidden))
        return logits.double().log_softmax(-1)

    def _attention(
        self, own: Any, hidden: torch.Tensor, at: torch.Tensor, window: int | None, sight: Sight
    ) -> torch.Tensor:
        heads = (len(hidden), -1, own.head_dim)
        query = own.q_norm(own.q_proj(hidden).view(heads)).transpose(0, 1)
        key = own.k_norm(own.k_proj(hidden).view(heads)).transpose(0, 1)
        value = own.v_proj(hidden).view(heads).transpose(0, 1)
        group = len(query) // len(key)
        key, value = (x.repeat_interleave(group, 0) for x in (self._rotate(key, at), value))
        scores = self._rotate(query, at) @ key.transpose(1, 2)
        distances = at[:, None] - at[None, :]
        visible = distances >= 0
        if window is not None:
            is_sink, is_prompt = at < sight.sinks, at < sight.prompt_len
            seen = (distances < window) | is_sink
            if sight.phase == "prefill":
                seen |= ~is_prompt[:, None]
            elif sight.phase == "decode":
                seen |= is_prompt[:, None] | is_prompt
            visible &= seen
            if sight.shift:  # the query stands where nothing has slid yet
                stands = at.clamp(max=sight.sinks + window - 1)
                if sight.phase == "prefill":
                    stands = torch.where(is_prompt, stands, at)
                turned = self._rotate(query, stands)
                if sight.turns_back:
                    turned = self._rotate(self._rotate(query, at), stands - at)
                shifted = turned @ key.transpose(1, 2)
                scores = torch.where(is_sink, shifted, scores)
        scores = (scores * own.scaling).masked_fill(~visible, float("-inf"))
        heads = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        projected: torch.Tensor = own.o_proj(heads)
        return projected

    def _rotate(self, states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[0] for t in self._model.model.rotary_emb(states, at[None]))
        first, second = states.chunk(2, dim=-1)
        turned: torch.Tensor = states * cos + torch.cat((-second, first), dim=-1) * sin
        return turned


@torch.no_grad()
def _reorder(model: Any, generator: torch.Generator) -> None:
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    neurons = torch.randperm(model.config.intermediate_size, generator=generator)
    # By module: along rows or columns; norms have one dimension. Others keep the order of heads.
    rows = {"o_proj": hidden, "down_proj": hidden, "gate_proj": neurons, "up_proj": neurons}
    columns = {"down_proj": neurons, "o_proj": None}
    for name, weight in model.named_parameters():  # tied ones once
        module = name.split(".")[-2]
        if module in ("q_norm", "k_norm"):
            continue
        if weight.dim() == 1:
            weight.copy_(weight[hidden])
            continue
        if module in rows:
            weight.copy_(weight[rows[module]])
        order = columns.get(module, hidden)
        if order is not None:
            weight.copy_(weight[:, order])


class TextOracle:
    """As :class:`~tests.helpers.dense_qwen3.DenseQwen3` scores, for long texts."""

    def __init__(self, directory: Path, sight: Sight) -> None:
        self._sight = sight
        self._models = [DenseText(directory, dtype) for dtype in (torch.float64, torch.float32)]

    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        sight, noise = replace(self._sight, prompt_len=prompt_len), 0.0
        exact = self._models[0].scores(tokens, range(len(tokens)), sight)
        for seen in (sight, replace(sight, turns_back=True))[: 1 + sight.shift]:
            rounded = self._models[1].scores(tokens, range(len(tokens)), seen)
            noise += (exact - rounded).abs().max().item()
        return OracleScores(exact, noise)
