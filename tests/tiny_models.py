"""Random tiny Qwen3 checkpoints and their Hugging Face oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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


def tiny_config(**overrides: Any) -> Qwen3Config:
    """A Qwen3 of four layers; ``overrides`` are config keys."""
    return Qwen3Config(
        **{
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
            **overrides,
        }
    )


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


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One random prompt a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


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
    def score(self, tokens: Sequence[int]) -> OracleScores:
        exact, rounded = (
            model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
            for model in self._models
        )
        return OracleScores(exact, (exact - rounded).abs().max().item())
