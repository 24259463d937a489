"""Tiny checkpoints of models that contain a Qwen3, made from the weights of a plain one.

The towers are left out: engines are started for text only, so Hugging Face's plain Qwen3 with the
same weights is the oracle.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_models import NUM_LAYERS, VOCAB_SIZE

SPECIAL = (
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<timestamp>"),
)
IDS = {token: VOCAB_SIZE - len(SPECIAL) + i for i, token in enumerate(SPECIAL)}
TEXT_ONLY = {"image": 0, "video": 0, "audio": 0}
TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
)
MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
    "image_size": 64,
    "apply_vit_abs_pos_embed": True,
}
PREPROCESSOR = {
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 4096},
}
AUDIO = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}
_VISION_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
_AUDIO_IDS = {
    "audio_token_id": IDS["<|audio_pad|>"],
    "audio_start_token_id": IDS["<|audio_start|>"],
    "audio_end_token_id": IDS["<|audio_end|>"],
}


def save_derived(
    directory: Path, kind: str, plain: Path, text: Mapping[str, Any] | None = None
) -> Path:
    """Write a derived checkpoint.

    Args:
        directory: where to; made if missing.
        kind: an architecture that :data:`KINDS` knows.
        plain: directory of a tiny Qwen3, or Qwen3-MoE, to take the text stack from.
        text: more keys of the text config: the window.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = json.loads((plain / "config.json").read_text())
    inner = {key: source[key] for key in TEXT_KEYS if key in source}
    if "num_local_experts" in inner:
        inner["num_experts"] = inner["num_local_experts"]
    inner |= {"rope_parameters": MROPE, "tie_word_embeddings": True, **(text or {})}
    config, rename = KINDS[kind](inner)
    config |= {"architectures": [kind], "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {rename(k): v for k, v in load_file(plain / "model.safetensors").items()}
    if kind == "Qwen3VLMoeForConditionalGeneration":
        weights = _fused_experts(weights)
    if kind == "ColQwen3":
        weights["custom_text_proj.weight"] = projection()
    save_file({k: v.contiguous() for k, v in weights.items()}, directory / "model.safetensors")
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE - len(SPECIAL))} | IDS
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")),  # noqa: S106 (no password)
        additional_special_tokens=list(SPECIAL),
        pad_token="w0",  # noqa: S106
    ).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return directory


def projection() -> torch.Tensor:
    """ColQwen3's projection to 16 dimensions."""
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(3))


def _vision_language(model_type: str) -> Any:
    def make(inner: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        config = {
            "model_type": model_type,
            "text_config": {"model_type": f"{model_type}_text", **inner},
            "vision_config": {"model_type": model_type, **VISION},
            **_VISION_IDS,
        }
        return config, lambda name: re.sub(r"^model\.", "model.language_model.", name)

    return make


def _col(inner: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    config, rename = _vision_language("qwen3_vl")(inner)
    return {**config, "embed_dim": 16}, rename


def _omni(inner: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    thinker = {
        "text_config": inner,
        "vision_config": VISION,
        "audio_config": AUDIO,
        **_VISION_IDS,
        **_AUDIO_IDS,
    }
    config = {"model_type": "qwen3_omni_moe", "thinker_config": thinker}
    return config, lambda name: f"thinker.{name}"


def _asr(inner: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    thinker = {"text_config": inner, "audio_config": AUDIO, **_AUDIO_IDS, "classify_num": 8}
    config = {"model_type": "qwen3_asr", "thinker_config": thinker}
    return config, lambda name: f"thinker.{name}"


KINDS: dict[str, Any] = {
    "ColQwen3": _col,
    "Qwen3ASRForConditionalGeneration": _asr,
    "Qwen3OmniMoeForConditionalGeneration": _omni,
    "Qwen3VLForConditionalGeneration": _vision_language("qwen3_vl"),
    "Qwen3VLMoeForConditionalGeneration": _vision_language("qwen3_vl_moe"),
}


def _fused_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as Qwen3-VL-MoE stores them: stacked and transposed, gate and up side by side."""
    plain = {k: v for k, v in weights.items() if ".experts." not in k}
    for layer in range(NUM_LAYERS):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        experts = [i for i in range(64) if f"{prefix}.{i}.up_proj.weight" in weights]

        def stacked(name: str, prefix: str = prefix, experts: list[int] = experts) -> torch.Tensor:
            return torch.stack([weights[f"{prefix}.{i}.{name}.weight"].T for i in experts])

        plain[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], -1)
        plain[f"{prefix}.down_proj"] = stacked("down_proj")
    return plain
