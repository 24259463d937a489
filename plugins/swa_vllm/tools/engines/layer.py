"""A windowed attention layer of real size, in an engine with random weights, beside vLLM's own."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
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
from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import first_visible
from swa_vllm.attention.cpu.builder import SWACPUMetadata
from swa_vllm.tools.common.timing import interleave

BLOCK_SIZE = 32
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
    """A windowed layer and what stock vLLM would serve it with.

    Attributes:
        decoder: the decoder layer that holds it.
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
        """Random query, key and value ``[num_tokens, num_heads, head_size]``."""
        attention, generator = self.attention, torch.Generator().manual_seed(0)
        dtype = attention.kv_cache.dtype
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        return tuple(
            torch.randn(num_tokens, n, attention.head_size, generator=generator).to(dtype)
            for n in heads
        )

    def run_stock(self, metadata: CPUAttentionMetadata, *qkv: torch.Tensor) -> torch.Tensor:
        """What vLLM does with the layer in one step: store keys and values, then attend."""
        query, key, value = qkv
        cache, layer = self.attention.kv_cache, self.attention
        self.stock_impl.do_kv_cache_update(layer, key, value, cache, metadata.slot_mapping)
        output = torch.empty_like(query)
        return self.stock_impl.forward(layer, query, key, value, cache, metadata, output)

    def run(self, metadata: SWACPUMetadata, *qkv: torch.Tensor) -> torch.Tensor:
        """What this plugin does with it."""
        query, key, value = qkv
        output = torch.empty_like(query)
        cache = self.attention.kv_cache
        return self.attention.impl.forward(
            self.attention, query, key, value, cache, metadata, output
        )

    def check(
        self,
        batch: CommonAttentionMetadata,
        qkv: tuple[torch.Tensor, ...],
        output: torch.Tensor,
        window: int,
        sink_tokens: int,
    ) -> float:
        """Hold the outputs of the last request, every 97th query's, against plain torch.

        Returns:
            The largest error, relative to the largest output.

        Raises:
            RuntimeError: it is more than 0.02.
        """
        length, num_queries = int(batch.seq_lens[-1]), int(batch.query_start_loc.diff()[-1])
        positions = torch.arange(length)
        asked = torch.arange(-1, -num_queries - 1, -97)
        pages = batch.block_table_tensor[-1, positions // BLOCK_SIZE].long()
        key, value = self.builder.page_layout.read(
            self.attention.kv_cache, pages * BLOCK_SIZE + positions % BLOCK_SIZE
        )
        mask = reference.visible_mask(positions[asked], positions, window, sink_tokens)
        query, key, value = (x.float().transpose(0, 1) for x in (qkv[0][asked], key, value))
        expected = reference.attention(query, key, value, mask).transpose(0, 1)
        error = (output[asked].float() - expected).abs().max() / expected.abs().max()
        if not error <= 0.02:
            raise RuntimeError(f"output differs from plain torch's by {100 * error:.1f} %")
        return float(error)

    def time_rest(self, num_tokens: int, rounds: int) -> float:
        """Seconds of the decoder layer's projections and MLP for so many tokens."""
        attention, decoder = self.attention, self.decoder
        dtype = attention.kv_cache.dtype
        hidden = torch.randn(num_tokens, decoder.self_attn.hidden_size).to(dtype)
        attended = torch.randn(num_tokens, attention.num_heads * attention.head_size).to(dtype)

        @torch.inference_mode()
        def rest() -> None:
            decoder.self_attn.qkv_proj(hidden)
            decoder.self_attn.o_proj(attended)
            decoder.mlp(hidden)

        return interleave({"rest": rest}, rounds)["rest"].median


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
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from vllm import LLM

    model = {
        **SHAPES[shape],
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
        llm = LLM(
            directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=num_pages,
            additional_config={"swa": {"window": window, **(options or {})}},
        )
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


def make_batch(
    context_lens: list[int],
    query_lens: list[int],
    pages: WindowPages | None = None,
    spare_tokens: int = 0,
) -> CommonAttentionMetadata:
    """A step's batch as the model runner gives it to builders.

    Args:
        pages: leave the holes that this window allows; None stores every page.
        spare_tokens: slots behind each request's newest token.
    """
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(context_lens, dtype=torch.int32) + starts.diff()
    num_tokens, width = int(starts[-1]), ceil_div(int(seq_lens.max()) + spare_tokens, BLOCK_SIZE)
    table = torch.zeros(len(query_lens), width, dtype=torch.int32)
    next_page, slots = 1, []
    for row, (context, length) in enumerate(zip(context_lens, query_lens, strict=True)):
        num_pages = ceil_div(context + length + spare_tokens, BLOCK_SIZE)
        table[row, :num_pages] = torch.arange(next_page, next_page + num_pages)
        next_page += num_pages
        if pages is not None:
            holes = pages.holes(ceil_div(context, BLOCK_SIZE), context + length)
            table[row, holes.start : holes.stop] = 0
        positions = torch.arange(context, context + length)
        slots.append(
            table[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        )
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(query_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.cat(slots),
    )


def make_window_batch(context_len: int, num_reqs: int, window: int) -> CommonAttentionMetadata:
    """A step of equal decoding requests, the pages of whose windows are numbered from 1 on."""
    batch = make_batch([context_len] * num_reqs, [1] * num_reqs)
    table, last = batch.block_table_tensor, context_len // BLOCK_SIZE
    first = first_visible(context_len, window) // BLOCK_SIZE
    table.zero_()
    table[:, first : last + 1] = 1 + torch.arange(num_reqs * (last + 1 - first)).view(num_reqs, -1)
    batch.slot_mapping = table[:, last].long() * BLOCK_SIZE + context_len % BLOCK_SIZE
    return batch
