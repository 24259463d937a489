"""The checkpoints of ``tests/data``, trained with a window, and what Hugging Face says of them."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.helpers.paths import DATA

SLIDING, MIXED = DATA / "tiny-swa-sliding", DATA / "tiny-swa-mixed"
NUM_LAYERS = 4
TEXT = DATA / "acts-1-7.txt"
TRAINED_WINDOW = 64
LENGTH = 32 * TRAINED_WINDOW  # tokens
# Windows to serve the checkpoints with, and the same said to Hugging Face.
OVERRIDES: dict[str, dict[str, Any]] = {
    "own": {},
    "half": {"sliding_window": TRAINED_WINDOW // 2},
    "double": {"sliding_window": 2 * TRAINED_WINDOW},
    "full": {"layer_types": ["full_attention"] * NUM_LAYERS},
    "one less": {"sliding_window": TRAINED_WINDOW - 1},
    "one more": {"sliding_window": TRAINED_WINDOW + 1},
}


@cache
def text_tokens(model: Path = SLIDING) -> list[int]:
    """Tokens of a text that the checkpoints were not trained on."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return list(tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids)


def held_out(model: Path) -> list[int]:
    """The first of them, as many as perplexity is taken of."""
    return text_tokens(model)[:LENGTH]


@cache
@torch.inference_mode()
def hugging_face(model: Path, case: str) -> float:
    """Perplexity of the held out text in fp32, eager, under the window that ``case`` names."""
    config = Qwen3Config.from_pretrained(model, **OVERRIDES[case])
    hf = Qwen3ForCausalLM.from_pretrained(
        model, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor(held_out(model))
    logits = hf(tokens[None], use_cache=False).logits[0, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits, tokens[1:]))
