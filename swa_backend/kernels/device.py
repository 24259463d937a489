"""The device that kernels are launched on, or compiled for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from swa_backend.kernels.plans import Target

_compile_target: ContextVar[Target | None] = ContextVar("compile_target", default=None)


@contextmanager
def pretend_device(target: Target) -> Iterator[None]:
    """Let every device pass for ``target`` in this thread, to compile for a GPU elsewhere."""
    token = _compile_target.set(target)
    try:
        yield
    finally:
        _compile_target.reset(token)


def target_of(device: torch.device) -> Target:
    """Give the target that kernels for tensors on ``device`` are compiled for.

    Raises:
        ValueError: no kernel runs there.
    """
    return _compile_target.get() or detect_target(device)


@cache
def detect_target(device: torch.device) -> Target:
    """Ask a device what it is; raises as :func:`target_of`, which callers use instead."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        num_processors = properties.multi_processor_count
        if torch.version.hip is not None:
            return Target("hip", properties.gcnArchName.split(":")[0], num_processors)
        return Target("cuda", 10 * properties.major + properties.minor, num_processors)
    from swa_backend.kernels.tiles import IS_INTERPRETED

    if device.type != "cpu" or not IS_INTERPRETED:
        raise ValueError(
            f'impl="triton" does not run on {device} tensors: use a GPU or impl="torch", or, on '
            "the CPU, set TRITON_INTERPRET=1 before Triton is imported (slow, for debugging)"
        )
    return Target("cpu", 0, num_processors=1)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Open a context whose launches go to the GPU of ``tensor``; nothing for a CPU tensor."""
    place: AbstractContextManager[object] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return place
