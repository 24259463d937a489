"""Watches what kernels read and write in Triton's interpreter.

There an address is a number that nobody checks: a read outside every tensor ends the process, a
read inside the wrong one goes unseen. Here both are errors, and bytes are counted. Where there is a
GPU, kernels run there compiled, and nothing is watched.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_WATCHED = DEVICE.type == "cpu"


class OutOfBoundsError(Exception):
    """A kernel touched memory that it must not."""


@dataclass(frozen=True)
class Region:
    """Memory of one tensor; of its first dimension's rows only ``allowed`` may be touched."""

    name: str
    start: int
    itemsize: int
    num_bytes: int
    allowed: np.ndarray | None


class Guard:
    """Tensors that the kernels may touch; ``bytes_touched`` by tensor name."""

    def __init__(self) -> None:
        self.bytes_touched = Counter[str]()
        self._regions: list[Region] = []

    def watch(self, name: str, tensor: torch.Tensor, allowed: torch.Tensor | None = None) -> None:
        """Let kernels touch ``tensor``, or only its elements where ``allowed``, of equal shape."""
        if not IS_WATCHED:
            return
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        flat = None if allowed is None else allowed.flatten().numpy()
        self._regions.append(Region(name, start, itemsize, span * itemsize, flat))

    def check(self, pointers: Any, mask: Any) -> None:
        """Count an access; raise where it goes astray."""
        address = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data].astype(np.int64)
        if not address.size:
            return
        for region in self._regions:
            offset = address - region.start
            if not ((offset >= 0) & (offset < region.num_bytes)).all():
                continue
            if region.allowed is not None and not region.allowed[offset // region.itemsize].all():
                raise OutOfBoundsError(f"{region.name}: an element that must not be touched")
            self.bytes_touched[region.name] += address.size * region.itemsize
            return
        raise OutOfBoundsError("outside every tensor")


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Loads and stores of interpreted kernels are checked and counted."""
    guard = Guard()
    if not IS_WATCHED:
        yield guard
        return
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        guard.check(pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.check(pointers, mask)
        return store(pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", checked_load)
        patch.setattr(interpreter_builder, "create_masked_store", checked_store)
        yield guard
