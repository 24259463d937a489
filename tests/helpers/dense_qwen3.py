"""Qwen3 with windows and sink tokens, dense and slow: an oracle that shares no code with us.

Weights, norms, MLP and rotary frequencies are Hugging Face's; attention is written out here, with
keys that are rotated anew for every query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import rms_norm
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.helpers.tiny_models import OracleScores


@dataclass(frozen=True)
class Sight:
    """What the layers see.

    Attributes:
        windows: of each layer; None for full attention.
        sinks: leading tokens that every query sees.
        shift: whether these lie just before the window, wherever it is.
        phase: whose queries have the windows: "both"; "prefill", the prompt's, and generated tokens
            see everything; "decode", generated tokens', which see the whole prompt too.
        prompt_len: tokens of the prompt, where phase is not "both"; said with each text.
        cached_from: the first position whose query reads all keys and values from a cache, of
            ``cache_dtype``; those before read none. None where a cache rounds nothing.
        turns_back: whether shifted queries get to their places from their own, by a second rotation
            as over a cache of keys: the angles of both are rounded. Else it is the same.
    """

    windows: tuple[int | None, ...]
    sinks: int = 0
    shift: bool = False
    phase: str = "both"
    prompt_len: int = 0
    cached_from: int | None = None
    cache_dtype: torch.dtype = torch.float8_e4m3fn
    turns_back: bool = False


def keep_dtype_in_norms(model: torch.nn.Module) -> None:
    """Hugging Face's round to fp32 in any dtype, which in fp64 is an error of its own.

    So do its angles; those stay, as engines have the same.
    """

    def forward(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = partial(forward, module)


class DenseQwen3:
    """In fp64, with its own fp32 error as the measure of noise."""

    def __init__(self, directory: Path, sight: Sight, **overrides: Any) -> None:
        config = Qwen3Config.from_pretrained(directory, **overrides)
        self._sight = sight
        self._models = [
            Qwen3ForCausalLM.from_pretrained(directory, config=config, dtype=dtype).eval()
            for dtype in (torch.float64, torch.float32)
        ]
        keep_dtype_in_norms(self._models[0])

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        sight = replace(self._sight, prompt_len=prompt_len)
        scores = self._score(tokens, sight)
        if not sight.shift:
            return scores
        # A cache rotates keys at their own positions first and shifts the result: the rounding
        # errors of both rotations.
        plain = self._score(tokens, replace(sight, shift=False))
        return replace(scores, noise=scores.noise + plain.noise)

    @torch.inference_mode()
    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The ``num_tokens`` tokens that are best after ``tokens``, one after the other."""
        text, sight = list(tokens), replace(self._sight, prompt_len=len(tokens))
        for _ in range(num_tokens):
            logprobs = self._logprobs(self._models[0], text, sight)
            text.append(int(logprobs[-1].argmax()))
        return text[len(tokens) :]

    def _score(self, tokens: Sequence[int], sight: Sight) -> OracleScores:
        exact, rounded = (self._logprobs(model, tokens, sight) for model in self._models)
        return OracleScores(exact, (exact - rounded).abs().max().item())

    def _logprobs(self, model: Any, tokens: Sequence[int], sight: Sight) -> torch.Tensor:
        hidden = model.model.embed_tokens(torch.tensor(tokens))
        for layer, window in zip(model.model.layers, sight.windows, strict=True):
            normed = layer.input_layernorm(hidden)
            attention = self._attention(model, layer, normed, window, sight)
            hidden = hidden + attention
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: torch.Tensor = model.lm_head(model.model.norm(hidden))
        return logits.double().log_softmax(-1)

    def _attention(
        self, model: Any, layer: Any, hidden: torch.Tensor, window: int | None, sight: Sight
    ) -> torch.Tensor:
        own = layer.self_attn
        heads = (len(hidden), -1, own.head_dim)
        query = own.q_norm(own.q_proj(hidden).view(heads)).transpose(0, 1)
        key = own.k_norm(own.k_proj(hidden).view(heads)).transpose(0, 1)
        value = own.v_proj(hidden).view(heads).transpose(0, 1)
        group = len(query) // len(key)
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        outputs = []
        for position in range(len(hidden)):
            seen, seats, seat = self._seats(position, window, sight)
            turned_query = self._rotate(model, query[:, position : position + 1], [seat])
            turned_key, seen_value = self._rotate(model, key[:, seen], seats), value[:, seen]
            if sight.cached_from is not None and position >= sight.cached_from:
                turned_key, seen_value = (
                    stored.to(sight.cache_dtype).to(stored.dtype)
                    for stored in (turned_key, seen_value)
                )
            scores = (turned_query @ turned_key.transpose(1, 2))[:, 0] * own.scaling
            outputs.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), seen_value))
        projected: torch.Tensor = own.o_proj(torch.stack(outputs).flatten(1))
        return projected

    @staticmethod
    def _seats(position: int, window: int | None, sight: Sight) -> tuple[list[int], list[int], int]:
        """Keys that a query sees, the positions they are rotated to, and the query's own."""
        keys = range(position + 1)
        is_answer = position >= sight.prompt_len
        if window is None or sight.phase == ("prefill" if is_answer else "decode"):
            return list(keys), list(keys), position
        kept = max(sight.sinks, sight.prompt_len) if sight.phase == "decode" else sight.sinks
        seen = [k for k in keys if k > position - window or k < kept]
        if sight.shift and len(seen) < len(keys):
            return seen, list(range(len(seen))), len(seen) - 1
        return seen, seen, position

    @staticmethod
    def _rotate(model: Any, states: torch.Tensor, positions: list[int]) -> torch.Tensor:
        cos, sin = (t[0] for t in model.model.rotary_emb(states, torch.tensor([positions])))
        first, second = states.chunk(2, dim=-1)
        turned: torch.Tensor = states * cos + torch.cat((-second, first), dim=-1) * sin
        return turned
