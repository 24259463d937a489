"""Flags that have the name, the unit and the meaning of vLLM's."""

import argparse
from typing import Any

from swa_vllm.tools.common.sizing import CACHE_DTYPES, MODEL_DTYPES

_FLAGS: dict[str, dict[str, Any]] = {
    "block_size": {"type": int, "metavar": "TOKENS", "help": "tokens of a KV cache page"},
    "dtype": {"choices": MODEL_DTYPES, "help": "dtype of the weights"},
    "kv_cache_dtype": {"choices": CACHE_DTYPES, "help": "dtype of the KV cache"},
    "tensor_parallel_size": {"type": int, "metavar": "N", "help": "devices that share a layer"},
    "pipeline_parallel_size": {
        "type": int,
        "metavar": "N",
        "help": "stages, with the layers that vLLM or VLLM_PP_LAYER_PARTITION gives them",
    },
    "max_num_batched_tokens": {
        "type": int,
        "metavar": "TOKENS",
        "help": "most tokens of a step: a longer prompt is computed in chunks of this size",
    },
    "max_num_seqs": {"type": int, "metavar": "N", "help": "most requests of a step"},
    "max_model_len": {
        "type": int,
        "metavar": "TOKENS",
        "help": "longest request, prompt and answer together",
    },
    "kv_memory": {
        "metavar": "SIZE",
        "help": 'memory of one device for the KV cache, such as "16GiB"',
    },
}


def add_engine_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add the flags that ``defaults`` names.

    Args:
        defaults: the default of each flag; a text says what happens without a flag whose value is
            None then.
    """
    for name, default in defaults.items():
        keywords = dict(_FLAGS[name])
        is_told = isinstance(default, str) and default not in keywords.get("choices", ())
        keywords["help"] += f" (default: {default})"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=None if is_told else default, **keywords)
