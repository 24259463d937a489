"""The metadata of a step for the kernels, made without a copy to the host or a loop."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from swa_backend import ops
from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.device import target_of
from swa_backend.ops.cache_write import WriteBatch
from swa_backend.ops.checks import check_integers, check_one_query_each, check_rows_of_requests
from swa_backend.ops.decode import DecodeBatch
from swa_backend.ops.prefill import PrefillBatch
from swa_backend.window import Phase
from swa_vllm.attention.layer import phase_of_layers
from swa_vllm.attention.layer_table import log_layers
from swa_vllm.attention.poison import NaNCheck, PoisonWatch
from swa_vllm.attention.triton.scratch import Scratch, largest_decode_batch

BatchT = TypeVar("BatchT", DecodeBatch, PrefillBatch)


@dataclass(frozen=True)
class Rows(Generic[BatchT]):
    """Neighbouring requests of a batch that one kernel serves.

    Attributes:
        batch: their attention, planned for every layer.
        tokens: theirs in the batch.
        block_table: int32 ``[num_reqs, max_pages]``; entries below the window may be stale.
        seq_lens: int32 ``[num_reqs]``.
        query_start_loc: int32 ``[num_reqs + 1]`` from 0; None where each has one query.
    """

    batch: BatchT
    tokens: slice
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None


@dataclass(frozen=True)
class SWATritonMetadata:
    """A step's batch for the layers of one group.

    Attributes:
        slots: int64 ``[num_tokens]``; -1 for a token that the KV cache need not keep.
        writes: their tokens' storing, prepared for every layer.
        decodes: requests of few queries, whose keys are all stored; they come first.
        prefills: the others.
        scratch: for any batch.
        distances: int64 ``[num_tokens]``, how far each query is beyond
            :func:`~swa_backend.window.last_unshifted`; None without shifted sinks.
        nan_check: what to check each layer's output with, if pages are poisoned.
    """

    slots: torch.Tensor
    writes: WriteBatch
    decodes: Rows[DecodeBatch] | None
    prefills: Rows[PrefillBatch] | None
    scratch: Scratch
    distances: torch.Tensor | None = None
    nan_check: NaNCheck | None = None

    @cached_property
    def scratch_tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What :meth:`Scratch.borrow` gives, the same for all layers of a step."""
        return self.scratch.borrow()


class SWATritonMetadataBuilder(AttentionMetadataBuilder[SWATritonMetadata]):
    """Splits a batch into decodes and prefills.

    A batch of decodes refers to vLLM's own persistent buffers and to those here, so a CUDA graph
    of it may be replayed.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        layer = layers[layer_names[0]]
        # A group's spec says the rest that its layers have in common.
        assert {layers[name].impl.scale for name in layer_names} == {layer.impl.scale}
        # Of a chunk not longer than the window every page is stored.
        limit = layer.impl.sliding_window or self.reorder_batch_threshold
        self._decode_threshold = min(self.reorder_batch_threshold, limit)
        scheduler = vllm_config.scheduler_config
        self._scratch = Scratch.for_layer(layer.impl, vllm_config, device)
        self._scratch.borrow()  # before vLLM captures its graphs
        self._sight = {
            "window": layer.impl.sliding_window,
            "sink_tokens": layer.impl.sink_tokens,
            "scale": layer.impl.scale,
            "phase": layer.impl.phase,
        }
        self._prompt_lens: torch.Tensor | None = None
        if phase_of_layers(layer_names, vllm_config) is not Phase.BOTH:
            most = largest_decode_batch(vllm_config, layer.impl.sliding_window)
            self._prompt_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._target = target_of(device)
        # Stand for the tensors of a layer, of which plans need shapes and dtypes only.
        self._query, self._key, self._kv_cache = self._meta_inputs(layer.impl)
        self._compile_kernels(layer.impl)
        max_tokens = scheduler.max_num_batched_tokens
        self._slots = torch.empty(max_tokens, dtype=torch.int64, device=device)
        self._starts = torch.empty(scheduler.max_num_seqs + 1, dtype=torch.int32, device=device)
        # The first position whose query is one beyond its place, if sinks are shifted.
        self._shift_start: int | None = layer.impl.shift_start
        self._tokens = torch.arange(max_tokens, device=device)
        self._distances = torch.empty(max_tokens, dtype=torch.int64, device=device)
        self._poison = PoisonWatch(kv_cache_spec, layer_names, vllm_config)
        log_layers(vllm_config, layer_names)

    def _meta_inputs(self, impl: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make queries and keys of the largest batch, and a cache, on the meta device."""
        spec, config = self.kv_cache_spec, self.vllm_config
        dtype = config.model_config.dtype
        max_tokens = max(
            config.scheduler_config.max_num_batched_tokens,
            largest_decode_batch(config, impl.sliding_window),
        )
        heads, size = impl.num_kv_heads, impl.head_size
        # On AMD a kernel depends on whether the cache is larger than 2 GB.
        num_pages = config.cache_config.num_gpu_blocks or 1
        return (
            torch.empty(max_tokens, impl.num_heads, size, dtype=dtype, device="meta"),
            torch.empty(max_tokens, heads, size, dtype=dtype, device="meta"),
            torch.empty(
                (num_pages, heads, spec.block_size, 2 * size),
                dtype=impl.cache_dtype or spec.dtype,
                device="meta",
            ),
        )

    def _compile_kernels(self, impl: Any) -> None:
        """Compile what any batch can launch, before vLLM captures graphs and serves."""
        rotation = impl.rotation
        ops.compile_kernels(
            self._query[: largest_decode_batch(self.vllm_config, impl.sliding_window)],
            self._kv_cache,
            window=impl.sliding_window,
            sink_tokens=impl.sink_tokens,
            phase=impl.phase,
            num_pages=self._max_num_pages() if impl.phase is not Phase.BOTH else None,
            has_drafts=self._decode_threshold > 1,
            rotations=None if rotation is None else rotation.table,
            is_neox=rotation is None or rotation.is_neox,
            device=self.device,
        )

    def _max_num_pages(self) -> int:
        """Entries of a row of the block table."""
        longest = self.vllm_config.model_config.max_model_len
        return int(self.kv_cache_spec.max_num_blocks_per_req(self.vllm_config, longest))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SWATritonMetadata:
        batch = common_attn_metadata
        num_tokens, slots = batch.num_actual_tokens, batch.slot_mapping
        num_decodes, num_prefills, split, _ = split_decodes_and_prefills(
            batch, decode_threshold=self._decode_threshold
        )
        prompt_lens = self._find_prompt_lens(batch)
        decodes = prefills = None
        if num_decodes:
            is_ragged = split > num_decodes
            decodes = self._plan_rows(
                DecodeBatch,
                slice(0, split),
                batch.block_table_tensor[:num_decodes],
                batch.seq_lens[:num_decodes],
                batch.query_start_loc[: num_decodes + 1] if is_ragged else None,
                None if prompt_lens is None else prompt_lens[:num_decodes],
            )
        if num_prefills:
            stop = num_decodes + num_prefills
            starts = self._starts[: num_prefills + 1]
            torch.sub(batch.query_start_loc[num_decodes : stop + 1], split, out=starts)
            prefills = self._plan_rows(
                PrefillBatch,
                slice(split, num_tokens),
                batch.block_table_tensor[num_decodes:stop],
                batch.seq_lens[num_decodes:stop],
                starts,
                None if prompt_lens is None else prompt_lens[num_decodes:stop],
            )
            # Slots of the null page, which stands for what is not stored.
            slots = self._slots[:num_tokens].copy_(slots[:num_tokens])
            slots.masked_fill_(slots < self.kv_cache_spec.block_size, -1)
        slots = slots[:num_tokens]
        check_integers("slot_mapping", slots, torch.int64, (None,))
        return SWATritonMetadata(
            slots=slots,
            writes=WriteBatch(slots, self._key, self._kv_cache, self._target),
            decodes=decodes,
            prefills=prefills,
            scratch=self._scratch,
            distances=self._find_distances(batch),
            nan_check=self._poison.watch_step(batch),
        )

    def _plan_rows(
        self,
        kind: type[BatchT],
        tokens: slice,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        prompt_lens: torch.Tensor | None,
    ) -> Rows[BatchT]:
        """Check neighbouring requests, and plan their attention."""
        call = AttentionCall(
            query=self._query[tokens],
            kv_cache=self._kv_cache,
            block_table=block_table,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            prompt_lens=prompt_lens,
            **self._sight,
        )
        check_rows_of_requests(call)
        if kind is DecodeBatch:
            check_one_query_each(call)
        batch = kind(call, self._target)
        return Rows(batch, tokens, block_table, seq_lens, query_start_loc)

    def _find_prompt_lens(self, batch: CommonAttentionMetadata) -> torch.Tensor | None:
        """Give the lengths of prompts, int32 ``[num_reqs]``, where a CUDA graph may read them.

        Rows that vLLM gives none, to warm up or to capture graphs, count as answers.
        """
        if self._prompt_lens is None:
            return None
        lens = self._prompt_lens[: batch.num_reqs].zero_()
        if (given := batch.rswa_prefix_lens) is not None:
            num_given = min(len(given), len(lens))
            lens[:num_given].copy_(given[:num_given], non_blocking=True)
        return lens

    def _find_distances(self, batch: CommonAttentionMetadata) -> torch.Tensor | None:
        if self._shift_start is None:
            return None
        tokens = self._tokens[: batch.num_actual_tokens]
        stops = batch.query_start_loc[1 : batch.num_reqs + 1]
        # Those behind the last request are padding: any number does.
        requests = torch.searchsorted(stops, tokens, right=True).clamp_(max=batch.num_reqs - 1)
        offsets = batch.seq_lens[: batch.num_reqs] - stops - self._shift_start
        distances = self._distances[: len(tokens)]
        torch.add(tokens, offsets[requests], out=distances)
        return distances.clamp_(min=0)
