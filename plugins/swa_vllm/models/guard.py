"""Models where windows cannot be served: stock as long as no window is asked for.

A class is made when it is asked for, as ``Untested`` or ``Unproven`` and its stock name, so that
each imports only what it needs.
"""

from functools import cache
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from swa_vllm.compat.versions import untested_reason
from swa_vllm.config.swa_config import wants_windows_decided
from swa_vllm.models.stock import stock_class


def refusing_windows(base: type[nn.Module], reason: str) -> type[nn.Module]:
    """A subclass of ``base`` that raises RuntimeError with ``reason`` if a window is asked for."""

    class RefusesWindows(base):  # type: ignore[misc, valid-type]
        # Not in __init__: some stock classes make an instance of another class in __new__.
        def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
            if not prefix and wants_windows_decided(vllm_config):
                raise RuntimeError(f"this model asks for sliding windows: {reason}")
            new = super().__new__
            if new is object.__new__:
                return new(cls)
            return new(cls, vllm_config=vllm_config, prefix=prefix)

    return RefusesWindows


@cache
def __getattr__(name: str) -> Any:
    if name.startswith("Untested"):
        return refusing_windows(stock_class(name.removeprefix("Untested")), untested_reason())
    if name.startswith("Unproven"):
        stock = name.removeprefix("Unproven")
        return refusing_windows(
            stock_class(stock),
            f"the Qwen3 inside {stock} was not tested with windows, so it is served with full "
            "attention only; remove the window from the options and the checkpoint",
        )
    raise AttributeError(f"module {__name__} has no attribute {name}")
