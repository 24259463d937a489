"""Checkpoints of models that draft for the tiny Qwen3."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers.tiny_models import FULL, VOCAB_SIZE, tiny_config

NUM_DRAFTED = 3
HIDDEN, HEAD, QUERIES, KEYS, MLP = 64, 32, 128, 64, 128
EAGLE3_SHAPES = {
    "midlayer.self_attn.q_proj": (QUERIES, 2 * HIDDEN),
    "midlayer.self_attn.k_proj": (KEYS, 2 * HIDDEN),
    "midlayer.self_attn.v_proj": (KEYS, 2 * HIDDEN),
    "midlayer.self_attn.o_proj": (HIDDEN, QUERIES),
    "midlayer.self_attn.q_norm": (HEAD,),
    "midlayer.self_attn.k_norm": (HEAD,),
    "midlayer.mlp.gate_proj": (MLP, HIDDEN),
    "midlayer.mlp.up_proj": (MLP, HIDDEN),
    "midlayer.mlp.down_proj": (HIDDEN, MLP),
    "midlayer.hidden_norm": (HIDDEN,),
    "midlayer.input_layernorm": (HIDDEN,),
    "midlayer.post_attention_layernorm": (HIDDEN,),
    "fc": (HIDDEN, 3 * HIDDEN),
    "norm": (HIDDEN,),
    "lm_head": (VOCAB_SIZE, HIDDEN),
    "embed_tokens": (VOCAB_SIZE, HIDDEN),
}


def save_draft(directory: Path, architecture: str, mask_token: int = 0, **overrides: Any) -> Path:
    """Write the config of a draft, of one layer unless ``overrides`` say otherwise."""
    config = tiny_config(**{**FULL, "num_hidden_layers": 1, **overrides}).to_dict()
    config |= {
        "architectures": [architecture],
        "draft_vocab_size": VOCAB_SIZE,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "dflash_config": {"target_layer_ids": [1, 2, 3], "mask_token_id": mask_token},
        "block_size": 4,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def save_eagle3(directory: Path, **overrides: Any) -> Path:
    """Write a random EAGLE-3 draft."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.3
        for name, shape in EAGLE3_SHAPES.items()
    }
    save_file(weights, directory / "model.safetensors")
    return save_draft(directory, "Eagle3Qwen3ForCausalLM", **overrides)


def eagle3_config(directory: Path, **overrides: Any) -> dict[str, Any]:
    """``speculative_config`` of an engine with a random EAGLE-3 draft."""
    model = str(save_eagle3(directory, **overrides))
    return {"method": "eagle3", "model": model, "num_speculative_tokens": NUM_DRAFTED}
