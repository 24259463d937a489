"""Memory that the kernels of all layers use one after the other."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import max_decode_query_len
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from swa_backend import ops


def largest_decode_batch(vllm_config: VllmConfig, window: int) -> int:
    """Count the tokens of the largest batch of decodes, with the padding of a CUDA graph."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    num_queries = min(max_decode_query_len(vllm_config), window)
    return max(vllm_config.scheduler_config.max_num_seqs * num_queries, graphs)


@dataclass(frozen=True)
class Scratch:
    """Memory that layers use one after the other, from vLLM's workspace where it has one (GPUs).

    Attributes:
        num_elements: fp32, for the largest batch of decodes.
        shifted: shape and dtype of shifted queries of the largest batch; None where there are none.
    """

    num_elements: int
    shifted: tuple[tuple[int, ...], torch.dtype] | None = None

    @classmethod
    def for_layer(cls, impl: Any, vllm_config: VllmConfig, device: torch.device) -> "Scratch":
        """Give the scratch of the largest batches.

        Args:
            impl: the implementation of a layer, whose shapes count.
        """
        num_elements = ops.decode_scratch_size(
            largest_decode_batch(vllm_config, impl.sliding_window),
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            sink_tokens=impl.sink_tokens,
            device=device,
        )
        if impl.shift_start is None:
            return cls(num_elements)
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        shape = (max_tokens, impl.num_heads, impl.head_size)
        return cls(num_elements, (shape, vllm_config.model_config.dtype))

    def borrow(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scratch and room for shifted queries; None where PyTorch has to allocate them."""
        if not is_workspace_manager_initialized():
            return None, None
        # Of one element where no batch is split: vLLM has no workspace of 0 bytes.
        shape = (max(1, self.num_elements),)
        wanted: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.float32)]
        if self.shifted is not None:
            wanted.append(self.shifted)
        decodes, *shifted = current_workspace_manager().get_simultaneous(*wanted)
        return decodes, shifted[0] if shifted else None
