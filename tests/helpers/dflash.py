"""Checkpoints of DFlash drafts for the tiny Qwen3."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers.eagle3 import HEAD, HIDDEN, KEYS, MLP, NUM_DRAFTED, QUERIES, save_draft

NUM_LAYERS = 2
LAYER_SHAPES = {
    "self_attn.q_proj": (QUERIES, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERIES),
    "self_attn.q_norm": (HEAD,),
    "self_attn.k_norm": (HEAD,),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def dflash_config(directory: Path, mask_token: int, **overrides: Any) -> dict[str, Any]:
    """``speculative_config`` of an engine with a DFlash draft, whose embeddings are the target's.

    Its layers add little to what they are given, which is ``mask_token``: that is what it drafts.
    """
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (HIDDEN, 3 * HIDDEN),
        "hidden_norm": (HIDDEN,),
        "norm": (HIDDEN,),
    }
    for layer in range(NUM_LAYERS):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator)
        * (0.01 if name.endswith(("o_proj", "down_proj")) else 0.3)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    save_draft(
        directory,
        "DFlashDraftModel",
        num_hidden_layers=NUM_LAYERS,
        is_causal=False,
        mask_token=mask_token,
        **overrides,
    )
    return {"method": "dflash", "model": str(directory), "num_speculative_tokens": NUM_DRAFTED}
