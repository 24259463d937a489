"""Models that draft for a windowed Qwen3: served with the same tokens, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import EngineFactory, ModelFactory
from engine_tools import generate, resolve_here, scheduler
from swa_backend.config import SWAConfigError
from tiny_models import FULL, MIXED, SLIDING, VOCAB_SIZE, WINDOW, random_prompts, tiny_config

LENGTHS = (5, WINDOW + 1, 4 * WINDOW)
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


def _save_draft(directory: Path, architecture: str, **overrides: Any) -> Path:
    """Write the config of a one-layer draft."""
    config = tiny_config(**{**FULL, "num_hidden_layers": 1, **overrides}).to_dict()
    config |= {
        "architectures": [architecture],
        "draft_vocab_size": VOCAB_SIZE,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "dflash_config": {"target_layer_ids": [1, 2, 3], "mask_token_id": 0},
        "block_size": 4,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _save_eagle3(directory: Path, **overrides: Any) -> Path:
    """Write a random EAGLE-3 draft."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.3
        for name, shape in EAGLE3_SHAPES.items()
    }
    save_file(weights, directory / "model.safetensors")
    return _save_draft(directory, "Eagle3Qwen3ForCausalLM", **overrides)


@pytest.mark.parametrize("sinks", [{}, {"sink_tokens": 33}], ids=["plain", "sinks"])
@pytest.mark.parametrize(
    "draft", [FULL, {**SLIDING, "sliding_window": 24}], ids=["full_draft", "sliding_draft"]
)
def test_eagle3_draft_changes_no_token(
    draft: dict[str, Any],
    sinks: dict[str, Any],
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
) -> None:
    prompts = random_prompts(LENGTHS)
    options = {"swa": {"window": WINDOW, "full_attention_layers": "0-1", **sinks}}
    alone = engine(tiny_model(**FULL), additional_config=options)
    plain = [a.tokens for a in generate(alone, prompts)]
    del alone
    resolve_here("Eagle3Qwen3ForCausalLM")
    llm = engine(
        tiny_model(**FULL),
        additional_config=options,
        speculative_config={
            "method": "eagle3",
            "model": str(_save_eagle3(tmp_path, **draft)),
            "num_speculative_tokens": 3,
        },
    )
    assert [a.tokens for a in generate(llm, prompts)] == plain
    again = generate(llm, prompts)
    assert [a.tokens for a in again] == plain
    assert again[-1].num_cached_tokens > 0
    # The options are the target's; the draft follows its own config.
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    windows = [layers[f"model.layers.{i}.self_attn.attn"].sliding_window for i in range(5)]
    assert windows == [None, None, WINDOW, WINDOW, 24 if draft.get("sliding_window") else None]
    assert scheduler(llm).num_spec_tokens == 3


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        ("draft_model", "Qwen3ForCausalLM", "by draft_model was not tested with windows"),
        ("dflash", "DFlashDraftModel", "by dflash was not tested with windows"),
        # By vLLM's CPU build itself.
        ("dspark", "Qwen3DSparkModel", "Model Runner V1 does not support: dspark"),
    ],
)
def test_other_drafts_are_refused_before_weights(
    method: str,
    architecture: str,
    message: str,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
) -> None:
    resolve_here(architecture)
    speculation = {
        "method": method,
        "model": str(_save_draft(tmp_path, architecture)),
        "num_speculative_tokens": 3,
    }
    with pytest.raises(ValueError, match=message):
        engine(tiny_model(**MIXED), speculative_config=speculation)


def test_sliding_draft_model_beside_a_full_target_is_refused(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    speculation = {
        "method": "draft_model",
        "model": str(tiny_model(**SLIDING)),
        "num_speculative_tokens": 3,
    }
    with pytest.raises(SWAConfigError, match="the part 'draft_model' of this model or engine"):
        engine(tiny_model(**FULL), speculative_config=speculation)
