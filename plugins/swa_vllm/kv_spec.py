"""KV cache spec of a windowed layer: what the engine core learns about it."""

from dataclasses import dataclass, fields

from vllm.v1.kv_cache_interface import SlidingWindowSpec


@dataclass(frozen=True, kw_only=True)
class SWASpec(SlidingWindowSpec):
    """A sliding window whose pages :class:`~swa_vllm.kv_manager.SWAManager` manages."""

    @classmethod
    def from_stock(cls, spec: SlidingWindowSpec) -> "SWASpec":
        """The same window, pages and dtype, managed by this plugin."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
