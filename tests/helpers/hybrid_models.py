"""Tiny models with linear attention beside full attention, and their Hugging Face oracle.

vLLM's CPU build runs linear attention in bfloat16 and with heads of 128 only.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.helpers.dense_qwen3 import Sight
from tests.helpers.derived_models import VISION
from tests.helpers.tiny_models import VOCAB_SIZE, OracleScores

LAYER_TYPES = ("linear_attention", "full_attention") * 2
PAGE_SIZE = 64  # the least multiple of 32 whose page holds the state of a layer
# An architecture, and Hugging Face's classes of its text stack.
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "Qwen3NextForCausalLM": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "Qwen3_5ForCausalLM": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "Qwen3_5ForConditionalGeneration": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "Qwen3_5MoeForCausalLM": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "Qwen3_5MoeForConditionalGeneration": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": len(LAYER_TYPES),
    "layer_types": list(LAYER_TYPES),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    # A window that is one token too short changes ten times as much as bfloat16 rounds.
    "initializer_range": 0.06,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
# No token leaves an expert out: rounding would choose others. A Qwen3-Next has them in the last
# layer alone, which vLLM asks of it.
_EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_MROPE = {**_ROPE, "mrope_section": [11, 11, 10], "mrope_interleaved": True}


def save_tiny_hybrid(directory: Path, kind: str, num_linear_heads: int = 1) -> Path:
    """Write a random checkpoint of an architecture of :data:`KINDS` to ``directory``."""
    torch.manual_seed(0)
    make_config, make_model = KINDS[kind]
    is_next = kind == "Qwen3NextForCausalLM"
    others: dict[str, Any] = {"rope_parameters": _ROPE if is_next else _MROPE}
    others |= {f"linear_num_{part}_heads": num_linear_heads for part in ("key", "value")}
    if is_next or "Moe" in kind:
        others |= _EXPERTS
    if is_next:
        others["decoder_sparse_step"] = len(LAYER_TYPES)
    make_model(make_config(**_COMMON, **others)).to(torch.bfloat16).save_pretrained(directory)
    if kind.endswith("ForConditionalGeneration"):
        _nest_text(directory, kind)
    return directory


def _nest_text(directory: Path, kind: str) -> None:
    """Make of a text model the text stack of a model that sees, without its vision tower."""
    file = directory / "config.json"
    text = json.loads(file.read_text())
    vision = {
        key: VISION[key] for key in VISION if not key.startswith(("deepstack", "image", "app"))
    }
    model_type = text["model_type"].removesuffix("_text")
    config = {
        "architectures": [kind],
        "model_type": model_type,
        "text_config": text,
        "vision_config": {"model_type": f"{model_type}_vision", **vision},
        "tie_word_embeddings": False,
    }
    file.write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    renamed = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(renamed, weights)


class HybridOracle:
    """Hugging Face's model in fp64, with its own error in bfloat16 as the measure of noise.

    Its linear attention computes in fp32 whatever the dtype.
    """

    def __init__(self, directory: Path, kind: str, sight: Sight) -> None:
        """Take a checkpoint of the text model alone, and what its layers with attention see."""
        self._sight = sight
        self._models = [
            KINDS[kind][1]
            .from_pretrained(
                directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            )
            .eval()
            for dtype in (torch.float64, torch.bfloat16)
        ]
        for model in self._models:  # a mask for each layer, by a kind of its own
            names = [f"{index}" for index in range(len(LAYER_TYPES))]
            object.__setattr__(model.model.config, "layer_types", names)

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        sight = replace(self._sight, prompt_len=prompt_len)
        exact, rounded = (self._logprobs(model, tokens, sight) for model in self._models)
        return OracleScores(exact, (exact - rounded).abs().max().item())

    def _logprobs(self, model: Any, tokens: Sequence[int], sight: Sight) -> torch.Tensor:
        masks = {
            str(index): None if kind == "linear_attention" else _mask(sight, window, len(tokens))
            for index, (kind, window) in enumerate(zip(LAYER_TYPES, sight.windows, strict=True))
        }
        masks = {k: m if m is None else m.to(model.dtype) for k, m in masks.items()}
        hidden = model.model(torch.tensor([tokens]), attention_mask=masks, use_cache=False)
        logprobs: torch.Tensor = model.lm_head(hidden.last_hidden_state)[0].double().log_softmax(-1)
        return logprobs


def _mask(sight: Sight, window: int | None, num_tokens: int) -> torch.Tensor:
    """What is added to scores, ``[1, 1, num_tokens, num_tokens]``: 0 or the least bfloat16."""
    queries, keys = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    sees = keys <= queries
    if window is not None:
        near = (queries - keys < window) | (keys < sight.sinks)
        if sight.phase == "prefill":
            near |= queries >= sight.prompt_len
        if sight.phase == "decode":
            near |= keys < sight.prompt_len
        sees &= near
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.bfloat16).min)[None, None]
