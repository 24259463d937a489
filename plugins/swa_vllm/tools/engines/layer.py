"""A windowed layer of a real model's size with random weights, beside stock vLLM's attention."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from swa_backend import reference
from swa_backend.window import Phase
from swa_vllm.attention.cpu.builder import SWACPUMetadata
from swa_vllm.tools.common.timing import time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE

# Shapes of one layer; the vocabulary is cut, no text is made.
SHAPES: dict[str, dict[str, int]] = {
    "Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}


@dataclass
class Layer:
    """A windowed layer in an engine, and what stock vLLM would serve it with.

    Attributes:
        llm: the engine.
        decoder: the decoder layer that holds the attention layer.
        attention: the attention layer; ``kv_cache`` ``[num_blocks, Hkv, block, 2 * head_size]``.
    """

    llm: Any
    config: VllmConfig
    decoder: Any
    attention: Any
    builder: Any
    stock_builder: CPUAttentionMetadataBuilder
    stock_impl: CPUAttentionBackendImpl

    def random_inputs(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Make random queries, keys and values, ``[num_tokens, num_heads, head_size]`` each."""
        attention, generator = self.attention, torch.Generator().manual_seed(0)
        dtype = attention.kv_cache.dtype
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        return tuple(
            torch.randn(num_tokens, n, attention.head_size, generator=generator).to(dtype)
            for n in heads
        )

    def beside_full_attention(self) -> "Layer":
        """The same layer beside stock vLLM's full attention."""
        builder, impl = copy.copy(self.stock_builder), copy.copy(self.stock_impl)
        builder.window_size = impl.sliding_window = -1
        return replace(self, stock_builder=builder, stock_impl=impl)

    def run_stock(self, metadata: CPUAttentionMetadata, *qkv: torch.Tensor) -> torch.Tensor:
        """Store keys and values and attend to them, as stock vLLM does in one step."""
        query, key, value = qkv
        cache, layer = self.attention.kv_cache, self.attention
        self.stock_impl.do_kv_cache_update(layer, key, value, cache, metadata.slot_mapping)
        output = torch.empty_like(query)
        return self.stock_impl.forward(layer, query, key, value, cache, metadata, output)

    def run(self, metadata: SWACPUMetadata, *qkv: torch.Tensor) -> torch.Tensor:
        """Store keys and values and attend to them, as this plugin does in one step."""
        query, key, value = qkv
        output = torch.empty_like(query)
        cache = self.attention.kv_cache
        return self.attention.impl.forward(
            self.attention, query, key, value, cache, metadata, output
        )

    def check_against_torch(
        self,
        batch: CommonAttentionMetadata,
        qkv: tuple[torch.Tensor, ...],
        output: torch.Tensor,
        window: int,
        sink_tokens: int,
        phase: Phase = Phase.BOTH,
        request: int = -1,
    ) -> float:
        """Compare the outputs of a request, every 97th query's from its last on, with plain torch.

        Args:
            phase: whose queries have the window; the batch then has the lengths of prompts.
            request: its row in the batch; the last one, unless said otherwise.

        Returns:
            The largest error, relative to the largest output.

        Raises:
            RuntimeError: it is more than 0.02.
        """
        length = int(batch.seq_lens[request])
        num_queries = int(batch.query_start_loc.diff()[request])
        positions = torch.arange(length)
        asked = torch.arange(-1, -num_queries - 1, -97)
        stop = int(batch.query_start_loc[1:][request])
        pages = batch.block_table_tensor[request, positions // BLOCK_SIZE].long()
        key, value = self.builder.page_layout.read_tokens(
            self.attention.kv_cache, pages * BLOCK_SIZE + positions % BLOCK_SIZE
        )
        prompt_len = 0 if batch.rswa_prefix_lens is None else int(batch.rswa_prefix_lens[request])
        mask = reference.reference_mask(
            positions[asked], positions, window, sink_tokens, phase, prompt_len
        )
        query, key, value = (x.float().transpose(0, 1) for x in (qkv[0][stop + asked], key, value))
        expected = reference.attention(query, key, value, mask).transpose(0, 1)
        error = (output[stop + asked].float() - expected).abs().max() / expected.abs().max()
        if not error <= 0.02:
            raise RuntimeError(f"output differs from plain torch's by {100 * error:.1f} %")
        return float(error)

    def time_rest(self, num_tokens: int, rounds: int) -> float:
        """Time the decoder layer's projections and MLP for so many tokens; returns seconds."""
        attention, decoder = self.attention, self.decoder
        dtype = attention.kv_cache.dtype
        hidden = torch.randn(num_tokens, decoder.self_attn.hidden_size).to(dtype)
        attended = torch.randn(num_tokens, attention.num_heads * attention.head_size).to(dtype)

        @torch.inference_mode()
        def rest() -> None:
            decoder.self_attn.qkv_proj(hidden)
            decoder.self_attn.o_proj(attended)
            decoder.mlp(hidden)

        return time_in_turns({"rest": rest}, rounds)["rest"].median


def make_layer(
    shape: str,
    window: int,
    max_model_len: int,
    num_pages: int,
    options: Mapping[str, Any] | None = None,
) -> Layer:
    """Start an engine with one layer of ``shape``; the caller's process must be on CPUs.

    Args:
        options: ``swa`` options beside the window.
    """
    swa = {"window": window, **(options or {})}
    llm = _start_one_layer_engine(SHAPES[shape], max_model_len, num_pages, swa)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    config = llm.llm_engine.vllm_config
    decoder = runner.model.model.layers[0]
    attention = decoder.self_attn.attn
    ((group,),) = runner.attn_groups
    builder = group.get_metadata_builder()
    stock_builder = CPUAttentionMetadataBuilder(
        builder.kv_cache_spec, builder.layer_names, config, torch.device("cpu")
    )
    stock_builder.window_size = window  # ours may be longer, by the copies of sinks
    with set_current_vllm_config(config):
        stock_impl = CPUAttentionBackendImpl(
            num_heads=attention.num_heads,
            head_size=attention.head_size,
            scale=attention.impl.scale,
            num_kv_heads=attention.num_kv_heads,
            alibi_slopes=None,
            sliding_window=window,
            kv_cache_dtype=attention.kv_cache_dtype,
        )
    return Layer(llm, config, decoder, attention, builder, stock_builder, stock_impl)


def _start_one_layer_engine(
    shape: Mapping[str, int], max_model_len: int, num_pages: int, swa: Mapping[str, Any]
) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from vllm import LLM

    with one_layer_engine_checkpoint(shape, max_model_len) as model:
        return LLM(
            model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=num_pages,
            additional_config={"swa": dict(swa)},
        )


@contextmanager
def one_layer_engine_checkpoint(shape: Mapping[str, int], max_model_len: int) -> Iterator[str]:
    """Write the config of a Qwen3 with one layer of ``shape``, without weights."""
    model = {
        **shape,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 512,
        "num_hidden_layers": 1,
        "head_dim": 128,
        "max_position_embeddings": max_model_len,
    }
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w") as file:
            json.dump(model, file)
        yield directory
