"""Random tiny Qwen3 checkpoints and their Hugging Face oracle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from swa_backend.reference import sliding_window_mask_4d

WINDOW = 40  # not a multiple of the page size
PAGE_SIZE = 32  # the smallest that vLLM's CPU attention takes
NUM_LAYERS = 4
VOCAB_SIZE = 512

SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
FULL = {"use_sliding_window": False}
# An explicit list that max_window_layers alone cannot say, in the shape stock vLLM takes for full.
BY_LAYER_TYPES = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": NUM_LAYERS,
    "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
}
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
    },
}


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_parameters": ROPE["default"],
    # Large enough for attention to matter and for the argmax to be clear.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


# Keys of a Qwen3-MoE of four experts a layer.
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


def tiny_config(**overrides: Any) -> Qwen3Config:
    """A Qwen3 of four layers; ``overrides`` are config keys."""
    return Qwen3Config(**{**_COMMON, **overrides})


def save_tiny_model(directory: Path, **overrides: Any) -> Path:
    """Write a random checkpoint (the same weights for every ``overrides``) to ``directory``."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.float().save_pretrained(directory)
    return directory


def save_tiny_moe(directory: Path, **overrides: Any) -> Path:
    """Write a random Qwen3-MoE of four experts a layer to ``directory``."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**{**_COMMON, **MOE, **overrides})
    Qwen3MoeForCausalLM(config).float().save_pretrained(directory)
    return directory


def save_tiny_llama(directory: Path) -> Path:
    """Write a random Llama to ``directory``: a model this project has nothing to do with."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


def save_lora(directory: Path, model: Path, merged: Path) -> None:
    """Write an adapter of q_proj and v_proj, and to ``merged`` the ``model`` with it."""
    generator = torch.Generator().manual_seed(1)
    whole = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    config, weights, tensors = whole.config, whole.state_dict(), {}
    for layer in range(NUM_LAYERS):
        for name, heads in (("q_proj", 4), ("v_proj", 2)):
            a = torch.randn(4, config.hidden_size, generator=generator) * 0.3
            b = torch.randn(heads * config.head_dim, 4, generator=generator) * 0.3
            module = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            weights[f"{module}.weight"] += b @ a
    whole.save_pretrained(merged)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "tiny",
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One random prompt a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


class MoeOracle:
    """Hugging Face's Qwen3-MoE decoder layers, each called with the mask of its own window.

    transformers has one mask for all layers of this model, so mixed layers need this.
    """

    def __init__(self, directory: Path, windows: Sequence[int | None]) -> None:
        self._windows = windows
        self._models = [
            Qwen3MoeForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            ).eval()
            for dtype in (torch.float64, torch.float32)
        ]

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> "OracleScores":
        exact, rounded = (self._logprobs(model, tokens) for model in self._models)
        return OracleScores(exact, (exact - rounded).abs().max().item())

    def _logprobs(self, model: Any, tokens: Sequence[int]) -> torch.Tensor:
        hidden = model.model.embed_tokens(torch.tensor([tokens]))
        positions = torch.arange(len(tokens))[None]
        rotary = model.model.rotary_emb(hidden, positions)
        for layer, window in zip(model.model.layers, self._windows, strict=True):
            mask = sliding_window_mask_4d(len(tokens), len(tokens), window, hidden.dtype)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        logits = model.lm_head(model.model.norm(hidden))[0]
        logprobs: torch.Tensor = logits.double().log_softmax(-1)
        return logprobs


@dataclass(frozen=True)
class OracleScores:
    """Hugging Face's next-token log-probabilities over a text.

    Attributes:
        logprobs: float64 ``[num_tokens, vocab]``: row ``i`` predicts token ``i + 1``.
        noise: largest difference between this model in fp32 and in fp64.
    """

    logprobs: torch.Tensor
    noise: float


class Oracle:
    """Hugging Face's eager Qwen3 in fp64, with its own fp32 error as the measure of noise."""

    def __init__(self, directory: Path, **overrides: Any) -> None:
        config = Qwen3Config.from_pretrained(directory, **overrides)
        self._models = [
            Qwen3ForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, attn_implementation="eager"
            ).eval()
            for dtype in (torch.float64, torch.float32)
        ]

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        exact, rounded = (
            model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
            for model in self._models
        )
        return OracleScores(exact, (exact - rounded).abs().max().item())
