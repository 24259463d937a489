"""The launch of a kernel."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton function; for tensors on the meta device compile it, and start nothing.

    Args:
        arguments: the kernel's, of which the first is a tensor.
        constants: the kernel's compile-time constants, and options of the compiler.
    """
    is_meta = arguments[0].device.type == "meta"
    compiled = kernel.run(*arguments, grid=grid, warmup=is_meta, **constants)
    if is_meta and compiled is not None:
        compiled[grid]  # loads it onto the device
