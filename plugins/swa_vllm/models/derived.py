"""Models with a plain Qwen3 as their text stack, with a window a layer.

A class is made when it is asked for by its stock name, so that each imports only what it needs.
"""

from functools import cache
from typing import Any

from swa_vllm.models.stock import stock_class
from swa_vllm.models.windowed import WindowedModel


@cache
def __getattr__(name: str) -> Any:
    stock = stock_class(name)
    return type(name, (WindowedModel, stock), {"__module__": __name__, "__doc__": stock.__doc__})
