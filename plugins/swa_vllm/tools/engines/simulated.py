"""An engine that has pages and no model: what its scheduler and page managers are made from."""

import json
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from swa_backend.options import PrefillPages
from swa_backend.window import Phase
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.common.arms import Arm

# The config of layers that do not exist: nothing but their pages counts.
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
}


@dataclass(frozen=True)
class Engine:
    """What an engine without a model is set up with.

    Attributes:
        num_pages: pages of the pool, each for all layers of a group.
        num_steps_in_flight: 1, or 2 with asynchronous scheduling.
        retention_interval: vLLM's ``prefix_cache_retention_interval``; None keeps every page.
        sink_tokens: leading tokens that this plugin's sliding layers keep.
        spare_tokens: slots behind the newest token, as this plugin's CPU backend needs for sinks.
        num_sliding_groups: KV groups of sliding layers.
        num_full_groups: KV groups of full layers beside them.
        phase: whose tokens have this plugin's window: both, or the generated ones alone.
    """

    window: int
    block_size: int
    num_pages: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_seqs: int = 256
    num_steps_in_flight: int = 1
    prefix_caching: bool = False
    prefill_pages: PrefillPages = PrefillPages.AUTO
    retention_interval: int | None = 0
    sink_tokens: int = 0
    spare_tokens: int = 0
    num_sliding_groups: int = 1
    num_full_groups: int = 0
    phase: Phase = Phase.BOTH


def simulated_config(engine: Engine) -> VllmConfig:
    """Make vLLM's configuration of an engine.

    Raises:
        ValueError: vLLM keeps another number of steps in flight.
    """
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w") as file:
            json.dump(MODEL, file)
        config = EngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=engine.block_size,
            max_model_len=engine.max_model_len,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
            enable_prefix_caching=engine.prefix_caching,
            enforce_eager=True,
        ).create_engine_config()
    # CPUs have no asynchronous scheduling, but the scheduler of it runs anywhere.
    config.scheduler_config.async_scheduling = engine.num_steps_in_flight > 1
    config.cache_config.num_gpu_blocks = engine.num_pages
    if config.max_concurrent_batches != engine.num_steps_in_flight:
        raise ValueError(
            f"steps in flight must be 1 or 2 with this vLLM, got {engine.num_steps_in_flight}"
        )
    return config


def simulated_specs(arm: Arm, engine: Engine, config: VllmConfig) -> list[KVCacheSpec]:
    """Make the KV cache spec of every group, full layers' first."""
    common: dict[str, Any] = {
        "block_size": engine.block_size,
        "num_kv_heads": 1,
        "head_size": 64,
        "dtype": torch.float32,
    }
    full = FullAttentionSpec(**common)
    sliding: KVCacheSpec = SlidingWindowSpec(**common, sliding_window=engine.window)
    if arm is Arm.FULL:
        sliding = full
    elif arm is Arm.SWA and engine.phase is Phase.DECODE:
        sliding = PromptWindowSpec.of_layer(
            sliding,
            config,
            sink_tokens=engine.sink_tokens,
            spare_tokens=engine.spare_tokens,
            poison_key=None,
        )
        full = PromptCacheSpec.from_stock(full, None)
    elif arm is Arm.SWA:
        storage = StoragePolicy(engine.sink_tokens, engine.spare_tokens, engine.prefill_pages)
        sliding = SWASpec.from_stock(sliding, config, storage)
    return [full] * engine.num_full_groups + [sliding] * engine.num_sliding_groups
