"""KV cache spec of a windowed layer: what the engine core learns about it."""

from dataclasses import dataclass, fields

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from swa_backend.options import PrefillPages
from swa_backend.pages import WindowPages, ceil_div
from swa_vllm.config.storage import StoragePolicy


@dataclass(frozen=True, kw_only=True)
class SWASpec(SlidingWindowSpec):
    """A sliding window whose pages :class:`~swa_vllm.kv_cache.manager.SWAManager` manages.

    Attributes:
        storage: what is stored beside the pages of the window.
        num_steps_in_flight: steps that may be scheduled and not yet settled at once.
        frees_by_schedule: whether a page is free once no step that is yet to be scheduled reads it,
            though one in flight may: a worker runs its steps in order, and writes the page in a
            later one. Otherwise it is free once all steps that read it are settled.
        rollback_tokens: how far below the end of what is scheduled the next query may start:
            speculative tokens of all steps in flight, which may be rejected; without speculation
            the tokens that a streaming session drops when its turn ends with steps in flight.
        lookahead_tokens: slots that a step takes beyond its own tokens.
        drops_last_hit: whether prefix cache hits give back their last page, as EAGLE's do.
        replayed_tokens: the last of the computed tokens that may be computed again.
        poison_key: names the engine whose free pages are to be poisoned; None for no poison.
        instance_id: vLLM's name of the engine; empty if nobody reads the manager's counts.
        engine_index: its data parallel rank.
    """

    storage: StoragePolicy
    num_steps_in_flight: int = 1
    frees_by_schedule: bool = False
    rollback_tokens: int = 0
    lookahead_tokens: int = 0
    drops_last_hit: bool = False
    replayed_tokens: int = 0
    poison_key: str | None = None
    instance_id: str = ""
    engine_index: int = 0

    @classmethod
    def from_stock(
        cls,
        spec: SlidingWindowSpec,
        vllm_config: VllmConfig,
        storage: StoragePolicy,
        *,
        poison_key: str | None = None,
    ) -> "SWASpec":
        """Make a spec like vLLM's ``spec`` whose pages this plugin manages."""
        num_steps = vllm_config.max_concurrent_batches
        speculation = vllm_config.speculative_config
        num_drafts = vllm_config.num_speculative_tokens
        # Rejected drafts go back over what is scheduled; a connector reads and writes pages beside
        # the steps, on streams and in processes of its own.
        has_connector = vllm_config.kv_transfer_config is not None
        frees_by_schedule = speculation is None and num_drafts == 0 and not has_connector
        return cls(
            **{f.name: getattr(spec, f.name) for f in fields(spec) if f.init},
            storage=storage,
            num_steps_in_flight=num_steps,
            frees_by_schedule=frees_by_schedule,
            rollback_tokens=num_steps - 1 if frees_by_schedule else num_steps * num_drafts,
            lookahead_tokens=vllm_config.num_lookahead_tokens,
            drops_last_hit=speculation is not None and speculation.use_eagle(),
            # A server that gets a whole prompt computes its last token again.
            replayed_tokens=int(has_connector),
            poison_key=poison_key,
            instance_id=vllm_config.instance_id,
            engine_index=vllm_config.parallel_config.data_parallel_index,
        )

    @property
    def pages(self) -> WindowPages:
        """Page arithmetic of this window."""
        return WindowPages(
            window=self.sliding_window + self.extra_retained_tokens + self.replayed_tokens,
            page_size=self.block_size,
            sink_tokens=self.storage.sink_tokens,
            rollback_tokens=self.rollback_tokens,
            drops_last_hit=self.drops_last_hit,
        )

    @property
    def num_ahead_tokens(self) -> int:
        """Slots that a step takes beyond its own tokens, for drafts and for the backend."""
        return self.lookahead_tokens + self.storage.spare_tokens

    @property
    def num_retained_tokens(self) -> int:
        """0, so that vLLM 0.33 nulls no entry of a row: sinks lie below the window."""
        return 0

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of a row of the workers' block table."""
        longest = max_len + self.storage.spare_tokens
        return int(super().max_num_blocks_per_req(vllm_config, longest))

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Pages that start-up sizing promises a request and run-time admission charges for it.

        Never more than vLLM's own cap, but for sinks, for the slots behind the newest token, and
        for those that a draft model takes ahead, which vLLM forgets.
        """
        pages, num_ahead = self.pages, self.num_ahead_tokens
        longest = max_model_len + self.storage.spare_tokens
        num_steps = self.num_steps_in_flight
        if self.frees_by_schedule:  # what earlier steps alone read is free
            max_in_flight_tokens = max_in_flight_tokens // num_steps + self.rollback_tokens
            num_steps = 1
        if self.storage.prefill_pages is not PrefillPages.ALL:
            return pages.charge(num_steps, max_in_flight_tokens, num_ahead, longest)
        stock = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        unknown_to_vllm = num_ahead + self.replayed_tokens
        held = stock + pages.num_sink_pages + ceil_div(unknown_to_vllm, self.block_size)
        return int(min(held, ceil_div(longest, self.block_size)))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, SWASpec) and spec.pages == self.pages and spec.storage == self.storage
            for spec in kv_cache_specs.values()
        )
