"""The pages of prompts, and of answers those inside the window.

With a window in generated tokens only, every query sees the whole prompt, and a generated token's
query the window beside it. So the prompt's pages stay as long as the request, its last one whole,
and what lies between them and the window is freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from weakref import WeakValueDictionary

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from swa_backend.metrics import PageCounts
from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import Phase, num_pinned
from swa_vllm.kv_cache.ledger import Held, PageLedger
from swa_vllm.kv_cache.prompt_cache import PromptCacheManager, PromptCacheSpec
from swa_vllm.metrics.board import Owner


@dataclass(frozen=True, kw_only=True)
class PromptWindowSpec(PromptCacheSpec):
    """A layer with a window in generated tokens only.

    A prompt may be as long as the model allows, so start-up sizing is full attention's.

    Attributes:
        window: tokens that a generated token sees beside the prompt, itself included.
        sink_tokens: leading tokens that every query sees, where the prompt is shorter.
        spare_tokens: slots behind the newest token that the attention backend writes to.
        lookahead_tokens: slots that a step takes beyond its own tokens, for drafts.
        max_in_flight_tokens: most tokens of all steps that are not yet settled.
        max_model_len: tokens of the longest request; None where nothing limits it.
        instance_id: vLLM's name of the engine; empty if nobody reads the manager's counts.
        engine_index: its data parallel rank.
    """

    window: int
    sink_tokens: int = 0
    spare_tokens: int = 0
    lookahead_tokens: int = 0
    max_in_flight_tokens: int = 0
    max_model_len: int | None = None
    instance_id: str = ""
    engine_index: int = 0

    @classmethod
    def of_layer(
        cls,
        spec: SlidingWindowSpec,
        vllm_config: VllmConfig,
        *,
        sink_tokens: int,
        spare_tokens: int,
        poison_key: str | None,
    ) -> Self:
        """Make a spec like vLLM's ``spec`` whose window generated tokens alone have."""
        return cls.from_stock(
            spec,
            poison_key,
            window=spec.sliding_window,
            sink_tokens=sink_tokens,
            spare_tokens=spare_tokens,
            lookahead_tokens=vllm_config.num_lookahead_tokens,
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            max_model_len=vllm_config.model_config.max_model_len,
            instance_id=vllm_config.instance_id,
            engine_index=vllm_config.parallel_config.data_parallel_index,
        )

    @property
    def num_ahead_tokens(self) -> int:
        """Slots that a step takes beyond its own tokens, for drafts and for the backend."""
        return self.lookahead_tokens + self.spare_tokens

    def pages(self, num_prompt_tokens: int) -> WindowPages:
        """Page arithmetic of a request, to which its prompt is what sinks are to a window."""
        pinned = num_pinned(self.sink_tokens, Phase.DECODE, num_prompt_tokens)
        return WindowPages(self.window, self.block_size, pinned)

    def charge(self, num_prompt_tokens: int) -> int:
        """Most pages that a request holds, however long its answer."""
        held = self.pages(num_prompt_tokens).max_held_without_holes(
            self.max_in_flight_tokens, self.num_ahead_tokens
        )
        if self.max_model_len is None:
            return held
        return min(held, ceil_div(self.max_model_len + self.spare_tokens, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest = vllm_config.model_config.max_model_len + self.spare_tokens
        return int(ceil_div(longest, self.block_size) * self.page_size_bytes)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of a row of the workers' block table."""
        longest = max_len + self.spare_tokens
        return int(super().max_num_blocks_per_req(vllm_config, longest))


class PromptWindowManager(PromptCacheManager):
    """Frees what lies between a request's prompt and the window of its newest token."""

    kv_cache_spec: PromptWindowSpec

    def __init__(self, kv_cache_spec: PromptWindowSpec, **kwargs: object) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._spare_tokens = kv_cache_spec.spare_tokens
        # Admission is asked before anyone tells the length of the prompt. With prefix caching a
        # request is known from its first step on, until vLLM drops it.
        self._requests: WeakValueDictionary[str, Request] = WeakValueDictionary()
        # By request: as its first pages were asked for.
        self._prompt_lens: dict[str, int] = {}
        self._held = PageLedger(
            Owner(kv_cache_spec.instance_id, kv_cache_spec.engine_index, self.kv_cache_group_id),
            window=kv_cache_spec.window,
            sink_tokens=kv_cache_spec.sink_tokens,
            num_ahead_tokens=kv_cache_spec.num_ahead_tokens,
            pinned="live_prompt",
        )

    def snapshot(self) -> PageCounts:
        """Counts since the engine started."""
        return self._held.snapshot()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens + self._spare_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            prefill_end=prefill_end,
        )
        request = self._requests.get(request_id)
        if not apply_admission_cap or request is None or request.resumable:
            return int(num_blocks)
        return int(min(num_blocks, self.kv_cache_spec.charge(request.num_prompt_tokens)))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        self._admit(request_id)
        self._held.count_hit(request_id, len(new_computed_blocks), num_local_computed_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        held = self._held.get(request_id) or self._admit(request_id)
        new = super().allocate_new_blocks(
            request_id, num_tokens + self._spare_tokens, num_tokens_main_model
        )
        if new:
            self._held.count_taken(held, len(new))
        return list(new)

    def _admit(self, request_id: str) -> Held:
        prompt_len = self._prompt_lens[request_id]
        spec = self.kv_cache_spec
        return self._held.admit_request(request_id, spec.pages(prompt_len), spec.charge(prompt_len))

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        self._requests[request.request_id] = request
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free pages that no later token of the request sees.

        Raises:
            RuntimeError: a session's next turn has moved the end of the prompt behind pages that
                were freed.
        """
        assert num_prompt_tokens is not None  # vLLM says so to managers of its own
        request = self._requests.get(request_id)
        prompt_len = self._prompt_lens.setdefault(request_id, num_prompt_tokens)
        held = self._held.get(request_id)
        if held is None:
            return
        if prompt_len != num_prompt_tokens:
            self._move_prompt_end(request_id, num_prompt_tokens, held)
        if request is not None and request.resumable:
            return  # the next turn of a session will be a prompt, and see all before it
        dead = held.pages.dead(processed_computed_tokens)
        num_dead = min(dead.stop, len(self.req_to_blocks[request_id])) - dead.start
        if num_dead > held.first_kept:
            self._remove_blocks_in_range(request_id, dead.start, dead.stop)
            self._held.count_left_window(request_id, num_dead - held.first_kept)
            held.first_kept = num_dead

    def _move_prompt_end(self, request_id: str, prompt_len: int, held: Held) -> None:
        if held.first_kept:
            raise RuntimeError(
                f"request {request_id} goes on with a new prompt, which sees keys that were freed: "
                'streaming input with swa.phase="decode" needs prefix caching; remove '
                "--no-enable-prefix-caching, or phase"
            )
        self._prompt_lens[request_id] = prompt_len
        spec = self.kv_cache_spec
        self._held.change_pages(request_id, spec.pages(prompt_len), spec.charge(prompt_len))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._prompt_lens.pop(request_id, None)
        self._held.end_request(request_id)
        return super().pop_blocks_for_free(request_id)
