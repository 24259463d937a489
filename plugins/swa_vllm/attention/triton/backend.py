"""Windowed attention on this project's Triton kernels: GPUs, and CPUs in Triton's interpreter."""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)

from swa_backend import ops
from swa_backend.ops.checks import check_head_dim, check_operands_of_layer
from swa_backend.window import Phase, last_unshifted
from swa_vllm.attention.rotation import Rotation
from swa_vllm.attention.triton.builder import SWATritonMetadata, SWATritonMetadataBuilder
from swa_vllm.attention.triton.scratch import Scratch
from swa_vllm.compat.cache_dtypes import UNQUANTIZED
from swa_vllm.config.implementation import FP8_DTYPES


class SWATritonImpl(AttentionImpl[SWATritonMetadata]):
    """Attention by the kernels: decodes over their window's pages, chunks also over their own keys.

    Attributes:
        cache_dtype: of fp8 pages, which are bytes to vLLM; None of others.
        rotation: of queries before they meet shifted sinks; None without them.
        shift_start: position up to which queries keep their distance to sinks; None where they all
            do.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        sink_tokens: int = 0,
        shifted_by: Any = None,
        phase: Phase = Phase.BOTH,
    ) -> None:
        """Take the arguments of vLLM's attention layer, and the plugin's own.

        Args:
            sink_tokens: leading tokens that every query sees.
            shifted_by: rotary embedding that gives them cache-relative positions.
            phase: whose queries have the window.

        Raises:
            ValueError: what the kernels have not got.
        """
        extras = {
            "ALiBi": alibi_slopes,
            "a soft cap of the logits": logits_soft_cap,
            "KV sharing": kv_sharing_target_layer_name,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        }
        if unknown := [name for name, value in extras.items() if value]:
            raise ValueError(
                f"windowed layers have no {', '.join(unknown)} on these kernels; remove the window"
            )
        check_head_dim(head_size, "remove the window")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.cache_dtype = FP8_DTYPES.get(kv_cache_dtype)
        self.rotation = None if shifted_by is None else Rotation(shifted_by)
        self.shift_start: int | None = None
        if shifted_by is not None and sliding_window is not None:
            self.shift_start = last_unshifted(sliding_window, sink_tokens)
        self.sink_tokens = sink_tokens
        self.phase = phase
        self._vllm_config = get_current_vllm_config_or_none()
        self._checked: set[tuple[Any, ...]] = set()

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SWATritonMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            # vLLM measures what a step takes: what is left is for the KV cache.
            if self._vllm_config is not None:
                Scratch.for_layer(self, self._vllm_config, query.device).borrow()
            return output.fill_(0)
        scales: dict[str, Any] = {}
        if self.cache_dtype is not None:
            kv_cache = kv_cache.view(self.cache_dtype)
            scales = {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}
        self._check_once(query, key, value, kv_cache, output)
        # Before attention: a request may hit a page that another one writes in this step.
        attn_metadata.writes.write(key, value, kv_cache, **scales)
        scratch, shifted = attn_metadata.scratch_tensors
        if self.rotation is not None:
            shifted = self._shift_queries(query, attn_metadata, shifted)
        if (rows := attn_metadata.decodes) is not None:
            tokens = rows.tokens
            rows.batch.attend(
                query[tokens],
                kv_cache,
                output[tokens],
                sink_query=None if shifted is None else shifted[tokens],
                scratch=scratch,
                **scales,
            )
        if (chunks := attn_metadata.prefills) is not None:
            tokens = chunks.tokens
            chunks.batch.attend(
                query[tokens],
                key[tokens],
                value[tokens],
                kv_cache,
                output[tokens],
                sink_query=None if shifted is None else shifted[tokens],
                **scales,
            )
        if attn_metadata.nan_check is not None:
            attn_metadata.nan_check.raise_on_nan(str(getattr(layer, "layer_name", layer)), output)
        return output

    def _shift_queries(
        self, query: torch.Tensor, attn_metadata: SWATritonMetadata, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Rotate queries to cache-relative distances from the sinks."""
        assert self.rotation is not None
        assert attn_metadata.distances is not None
        num_tokens = len(attn_metadata.distances)
        return ops.rotate_back(
            query[:num_tokens],
            attn_metadata.distances,
            self.rotation.table,
            is_neox=self.rotation.is_neox,
            out=None if out is None else out[:num_tokens],
            impl="triton",
        )

    def _check_once(self, *tensors: torch.Tensor) -> None:
        """Check a layer's tensors, unless all were of these shapes, dtypes and strides before.

        The number of tokens is left out, which is another in each step.
        """
        kind = tuple((t.shape[1:], t.dtype, t.stride(), t.device) for t in tensors)
        if kind not in self._checked:
            check_operands_of_layer(*tensors)
            self._checked.add(kind)


class SWATritonBackend(AttentionBackend):
    """Backend of windowed layers on GPUs; they select it themselves."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*UNQUANTIZED, *FP8_DTYPES]
    # A step's metadata says which tokens the cache keeps.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SWATritonImpl]:
        return SWATritonImpl

    @staticmethod
    def get_builder_cls() -> type[SWATritonMetadataBuilder]:
        return SWATritonMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
