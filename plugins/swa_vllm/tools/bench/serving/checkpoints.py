"""Checkpoints that all arms share: the same weights, with and without a window."""

import json
from pathlib import Path
from typing import Any

import torch

from swa_vllm.tools.common.hub import find_model


def make_windowed_checkpoint(model: Path, directory: Path, window: int | None) -> Path:
    """Make a checkpoint of ``model``'s files in which all layers slide, or none.

    It says so in ``config.json``, where vLLM and Hugging Face look: stock vLLM slides all layers
    or none, and takes no window from ``--hf-overrides``.

    Raises:
        ValueError: ``model`` is no directory with a dense Qwen3 in Hugging Face's format.
    """
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model} is no checkpoint directory (config.json: {error}); give one with a dense "
            "Qwen3"
        ) from error
    if config.get("model_type") != "qwen3":
        raise ValueError(
            f"{model} is a {config.get('model_type')!r}; peers share a window in a dense Qwen3 "
            "(model_type 'qwen3') only; give one"
        )
    directory.mkdir()
    for path in model.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.resolve())
    config.pop("layer_types", None)
    num_full = config["num_hidden_layers"] if window is None else 0
    config |= {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": num_full,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def save_random_checkpoint(directory: Path, max_position_embeddings: int, seed: int = 0) -> Path:
    """Save a small Qwen3 of random weights: 2 layers of 2 KV heads, 2 million parameters.

    Its answers are not those of an untrained model, which barely look at the text: weights are
    large, so that the best token is clear and depends on what is visible.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def prepare_checkpoints(
    model: Path | None, directory: Path, window: int, longest: int, seed: int
) -> dict[bool, Path]:
    """Make the checkpoints of all arms in ``directory``.

    Args:
        model: None is one of random weights, made for texts of ``longest`` tokens.

    Returns:
        The checkpoint with all layers sliding by True, that with all full by False.
    """
    if model is None:
        model = save_random_checkpoint(directory / "random", longest, seed)
    else:
        model = find_model(str(model), whole=True)
    return {
        True: make_windowed_checkpoint(model, directory / "sliding", window),
        False: make_windowed_checkpoint(model, directory / "full", None),
    }


def vocabulary_of_arms(model: Path) -> int:
    """Read how many tokens a checkpoint knows."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])
