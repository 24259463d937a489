"""Full attention's pages, of which the prefix cache keeps those of prompts alone.

With a window in one phase only, a key of a generated token is made under another mask than a
prompt's of the same text. So no page that is not wholly inside its request's prompt is cached, by
any layer of such a model, and a request that may have begun to answer looks nothing up: after
preemption it would find another request's prompt in the place of its own answer.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.request import Request

from swa_vllm.kv_cache import live_managers


@dataclass(frozen=True, kw_only=True)
class PromptCacheSpec(FullAttentionSpec):
    """A layer that holds every page, and caches those of prompts.

    Attributes:
        poison_key: names the engine whose free pages are to be poisoned; None for no poison.
    """

    poison_key: str | None = None

    @classmethod
    def from_stock(cls, spec: AttentionSpec, poison_key: str | None, **others: Any) -> Self:
        """Make a spec of pages like those of ``spec``, whatever its window.

        Args:
            others: what a subclass has beyond.
        """
        shared = {f.name for f in fields(FullAttentionSpec) if f.init} & {
            f.name for f in fields(spec)
        }
        values = {name: getattr(spec, name) for name in shared - {"sliding_window"}}
        return cls(**values, poison_key=poison_key, **others)

    @classmethod
    def merge(cls, specs: list["PromptCacheSpec"]) -> "PromptCacheSpec":
        """Give the spec of a group; vLLM's would make one that caches answers too."""
        assert all(spec == specs[0] for spec in specs), "these layers have pages of several kinds"
        return copy.copy(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class PromptCacheManager(FullAttentionManager):
    """vLLM's manager of full attention, which stops caching at the end of the prompt."""

    def __init__(self, kv_cache_spec: PromptCacheSpec, **kwargs: object) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # By request, of the prompt that it came with: a session's next turn does not move it.
        self._prompt_ends: dict[str, int] = {}
        if kv_cache_spec.poison_key is not None:
            live_managers.add_manager(kv_cache_spec.poison_key, self)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        end = self._prompt_ends.setdefault(request.request_id, request.num_prompt_tokens)
        super().cache_blocks(
            request, min(num_tokens, end), retention_interval, replay_boundaries=replay_boundaries
        )
        # Beside groups of another kind vLLM rounds the tokens down, by less than this.
        if num_tokens + self.scheduler_block_size > end:
            # vLLM's lookup knows no request: this is its way to have none.
            request.skip_reading_prefix_cache = True

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._prompt_ends.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
