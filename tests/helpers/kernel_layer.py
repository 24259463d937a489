"""One windowed layer on the kernels with its builder, without an engine, and steps for it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from swa_backend import reference
from swa_vllm.attention import layer_table as report
from swa_vllm.attention.backends import windowed_backend
from swa_vllm.attention.layer import WindowedAttention
from swa_vllm.attention.triton.builder import SWATritonMetadata
from swa_vllm.config.swa_config import SWAConfig

PAGE, WINDOW, SINKS, HEADS, SIZE = 32, 20, 4, 2, 32
CPU = torch.device("cpu")


def windowed_layer(
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    rotary: Any,
) -> tuple[WindowedAttention, AttentionGroup]:
    """A layer as a model makes it, and its group, which has no builder yet."""
    monkeypatch.setattr(report, "get_tensor_model_parallel_rank", lambda: 1)
    name, swa = "model.layers.0.self_attn.attn", SWAConfig.from_vllm(config)
    with set_current_vllm_config(config):
        layer = WindowedAttention(
            num_heads,
            SIZE,
            SIZE**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=config.cache_config,
            per_layer_sliding_window=window,
            attn_backend=windowed_backend(swa.implementation),
            swa=swa,
            rotary=rotary,
            prefix=name,
        )
    spec = layer.get_kv_cache_spec(config)
    return layer, AttentionGroup(layer.get_attn_backend(), [name], spec, 0)


class KernelLayer:
    """One windowed layer with its group, and a pool of pages."""

    def __init__(
        self,
        model: Any,
        monkeypatch: pytest.MonkeyPatch,
        window: int = WINDOW,
        rotary: Any = None,
        sink_tokens: int = SINKS,
        num_heads: int = HEADS,
        num_kv_heads: int = 1,
        phase: str = "both",
        **kwargs: Any,
    ) -> None:
        options = {"window": window, "sink_tokens": sink_tokens, "impl": "triton", "phase": phase}
        if rotary is not None:
            options["position_shift"] = True
        args = {
            "dtype": "float32",
            "block_size": PAGE,
            "max_num_batched_tokens": 128,
            "max_model_len": 128,
            "max_num_seqs": 8,
            **kwargs,
        }
        self.config = EngineArgs(
            str(model), additional_config={"swa": options}, **args
        ).create_engine_config()
        self.layer, self.group = windowed_layer(
            self.config,
            monkeypatch,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window=window,
            rotary=rotary,
        )
        self.spec = self.group.kv_cache_spec
        with set_current_vllm_config(self.config):
            self.group.create_metadata_builders(self.config, CPU, kernel_block_size=PAGE)
        self.name = self.layer.layer_name
        self.phase = phase
        # By a phase launches depend on the width of the table, which vLLM never changes.
        longest = self.config.model_config.max_model_len
        self.min_table_width = 4 if phase == "both" else -(-longest // PAGE)
        self.rotary = rotary

    def shifted(self, query: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor | None:
        """Queries as the sinks shall meet them: no further away than just before the window."""
        if self.rotary is None:
            return None
        starts, seq_lens = batch["query_start_loc"].tolist(), batch["seq_lens"].tolist()
        distances = torch.zeros(len(query), dtype=torch.int64)
        for start, stop, seq_len in zip(starts, starts[1:], seq_lens, strict=False):
            positions = torch.arange(seq_len - (stop - start), seq_len)
            distances[start:stop] = (positions - (WINDOW + SINKS - 1)).clamp(min=0)
        return reference.rotate_back(query, distances, self.rotary.cos_sin_cache)

    def batch(
        self,
        requests: Any,
        pad_to: int = 0,
        num_padding: int = 0,
        prompt_lens: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Tensors of a step as vLLM keeps them: padded rows have no tokens, padded slots are -1.

        The lengths of prompts are not padded (Model Runner V2).
        """
        rows = [*requests, *[(0, 0)] * (pad_to - len(requests))]
        lengths = torch.tensor([n for _, n in rows])
        starts = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        seq_lens = torch.tensor([context + n for context, n in rows]).int()
        width = max(self.min_table_width, *(-(-(context + n) // PAGE) for context, n in rows))
        table = torch.arange(1, 1 + width * len(rows)).view(len(rows), width).int()
        slots = [
            int(table[r, p // PAGE]) * PAGE + p % PAGE
            for r, (context, n) in enumerate(rows)
            for p in range(context, context + n)
        ]
        return {
            "query_start_loc": starts,
            "seq_lens": seq_lens,
            "block_table": table,
            "slots": torch.tensor([*slots, *[-1] * num_padding]),
            "max_query_len": int(lengths.max()),
            "num_tokens": len(slots) + num_padding,
            "prompt_lens": None if prompt_lens is None else torch.tensor(prompt_lens).int(),
        }


def by_v1(layer: KernelLayer, batch: dict[str, Any]) -> SWATritonMetadata:
    """As ``GPUModelRunner`` calls the builder."""
    common = CommonAttentionMetadata(
        query_start_loc=batch["query_start_loc"],
        query_start_loc_cpu=batch["query_start_loc"].clone(),
        seq_lens=batch["seq_lens"],
        num_reqs=len(batch["seq_lens"]),
        num_actual_tokens=batch["num_tokens"],
        max_query_len=batch["max_query_len"],
        max_seq_len=128,
        block_table_tensor=batch["block_table"],
        slot_mapping=batch["slots"],
        causal=True,
        rswa_prefix_lens=batch["prompt_lens"],
    )
    metadata: SWATritonMetadata = layer.group.get_metadata_builder().build(0, common)
    return metadata
