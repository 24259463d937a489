"""Prefill and decode on servers of their own, which exchange pages over NIXL.

Before two servers do, vLLM compares a hash of what the pages of both must have in common. Windows
are not in it, and a server would take pages of another window for its own.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import torch
from vllm.config import ModelConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")


class NixlConnector(NixlPullConnector):
    """vLLM's connector of this name, which compares windows, pages and RoPE too."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if current_platform.is_cpu():
            # The first forward of a server that answers is one token. With AMX that ends vLLM's CPU
            # build by SIGILL, unless a longer one came before.
            torch.cpu._init_amx()
        super().register_kv_caches(kv_caches)
        worker = self.connector_worker
        assert worker is not None
        # In words: vLLM's error quotes what both servers have.
        pages = f"{describe_pages(self.kv_cache_config)}; {describe_rope(worker.model_config)}"
        worker.compat_hash = f"{worker.compat_hash} ({pages})"
        worker.xfer_handshake_metadata = replace(
            worker.xfer_handshake_metadata, compatibility_hash=worker.compat_hash
        )

    def on_new_request(self, request: Request) -> None:
        transfer = request.kv_transfer_params
        if transfer and transfer.get("do_remote_decode") and request.max_tokens > 1:
            # Tokens behind the prompt would move the window from which the other server reads.
            logger.warning_once(
                "SWA: another server gets the pages of a prompt and not those of an answer. "
                "Requests with do_remote_decode end after one token; ask with max_tokens=1"
            )
            request.max_tokens = 1
        super().on_new_request(request)


def describe_pages(config: KVCacheConfig) -> str:
    """Say which layers have which window, and how many tokens a page has.

    Returns:
        As ``layers 0-2: window 64, pages of 32; layer 3: full, pages of 32``.
    """
    layers = sorted(
        (extract_layer_index(name), _describe(group.kv_cache_spec))
        for group in config.kv_cache_groups
        for name in group.layer_names
    )
    runs = groupby(layers, key=lambda layer: layer[1])
    return "; ".join(f"{_span(i for i, _ in run)}: {pages}" for pages, run in runs)


def describe_rope(config: ModelConfig) -> str:
    """Say by what keys are rotated before they are stored: a text that is equal where they are."""
    return "rope " + json.dumps(config.hf_text_config.rope_parameters, sort_keys=True)


def _describe(spec: KVCacheSpec) -> str:
    window = getattr(spec, "sliding_window", None)
    return f"{f'window {window}' if window else 'full'}, pages of {spec.block_size}"


def _span(layers: Iterable[int]) -> str:
    first, *others = layers
    return f"layers {first}-{others[-1]}" if others else f"layer {first}"
