"""The setup of engines that score a text: its options, and what is refused before a start."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from swa_backend.layers import LayerPlan, resolve_layers
from swa_backend.options import SWAOptions
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.hub import download_command, is_hub_name
from swa_vllm.tools.engines.forced import ForcedTokens

FULL_ATTENTION: Mapping[str, Any] = {"enabled": False}


@dataclass(frozen=True)
class Setup:
    """What all engines of a measurement have in common.

    Attributes:
        max_num_batched_tokens: tokens of a prefill chunk; the logits of all of them are computed.
        block_size: tokens of a page; None leaves it to vLLM.
        arguments: more arguments of ``LLM``.
    """

    model: str
    max_model_len: int
    dtype: str = "auto"
    max_num_batched_tokens: int = 512
    block_size: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def setup_of(
    args: argparse.Namespace,
    hf_config: Any,
    max_model_len: int,
    *,
    forces_tokens: bool = False,
) -> Setup:
    """Set up the engines that the command line asks for.

    Args:
        max_model_len: the RoPE table is made to reach it.
        forces_tokens: whether given tokens are to be decoded.

    Raises:
        ValueError: an option is out of range, or RoPE cannot reach so far.
    """
    check_number_arguments(args, ("max_num_batched_tokens", "block_size"))
    arguments: dict[str, Any] = {}
    if forces_tokens:
        arguments["logits_processors"] = [ForcedTokens]
        # The V2 runner, vLLM's choice on GPUs, takes logits processors of another kind.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if max_model_len > hf_config.max_position_embeddings:
        check_rope_can_grow(hf_config, max_model_len)
        # vLLM sizes its RoPE table from it.
        arguments["hf_overrides"] = {"max_position_embeddings": max_model_len}
    return Setup(
        args.model,
        max_model_len,
        args.dtype,
        args.max_num_batched_tokens,
        args.block_size,
        arguments,
    )


def check_rope_can_grow(hf_config: Any, max_model_len: int) -> None:
    """Refuse a RoPE whose table does not follow ``max_position_embeddings``.

    Raises:
        ValueError: it is of such a kind.
    """
    rope: Mapping[str, Any] = getattr(hf_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(
            f"{max_model_len} tokens are more than max_position_embeddings="
            f"{hf_config.max_position_embeddings}, and RoPE of the type {kind!r} cannot be made "
            "longer by that key; ask for fewer tokens"
        )


def scoring_text_config(model: str) -> Any:
    """Read Hugging Face's config of a checkpoint's text layers.

    Raises:
        ValueError: there is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        command = f", or run {download_command(model, whole=True)}" if is_hub_name(model) else ""
        raise ValueError(
            f"{model}: no directory with the config.json of a model, and none of the hub's that "
            f"can be had from here; give a directory{command} ({error})"
        ) from error


def resolve_scoring_options(hf_config: Any, options: Mapping[str, Any]) -> LayerPlan:
    """Resolve ``swa`` options to what each layer does, before an engine starts.

    Raises:
        SWAConfigError: the plugin refuses them for this model.
    """
    return resolve_layers(hf_config, SWAOptions.from_dict(dict(options)))
