"""Launches of a kernel: by Triton for arguments of a new kind, past its binder for a known one."""

import inspect
from functools import lru_cache
from typing import Any

import torch

from swa_backend.kernels.plans import Target

_Items = tuple[tuple[str, Any], ...]


class Launcher:
    """Launches a kernel with one set of compile-time constants.

    At each launch Triton describes every argument to find what it compiled for them, which takes
    longer than anything else that the host does for a layer. Here the kind of a launch are the
    device, the dtypes, where tensors begin within 16 bytes, and the strides: as much as Triton
    looks at, or more. A launch of a new kind is Triton's, which compiles what it has to; a known
    one calls the kernel that Triton chose.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, Any], options: dict[str, Any], *, is_direct: bool
    ) -> None:
        """Take a Triton function, its constants, and options of the compiler."""
        self._kernel = kernel
        self._keywords = {**constants, **options}
        parameters = inspect.signature(kernel.fn).parameters
        self._values = tuple(constants[name] for name in parameters if name in constants)
        self._is_direct = is_direct
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        indices: tuple[torch.Tensor | None, ...],
        strides: tuple[int, ...],
        numbers: tuple[float, ...],
    ) -> None:
        """Launch on the current device; for tensors on the meta device compile, and start nothing.

        The four are the kernel's arguments, in its order.

        Args:
            tensors: those for whose beginning Triton may specialize the kernel.
            indices: those for which the kernel forbids it; None where its constants say so.
            strides: integers for which Triton may specialize the kernel.
            numbers: floats, and integers below 2**31 for which the kernel forbids it.
        """
        kind = (
            *strides,
            tensors[0].device,
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() % 16 for tensor in tensors],
            *[tensor is None or tensor.dtype for tensor in indices],
        )
        known = self._known.get(kind)
        arguments = (*tensors, *indices, *strides, *numbers)
        if known is not None:
            known[grid](*arguments, *self._values)
            return
        is_meta = tensors[0].is_meta
        compiled = self._kernel.run(*arguments, grid=grid, warmup=is_meta, **self._keywords)
        if compiled is None:  # interpreted
            return
        if is_meta:
            compiled[grid]  # loads it onto the device
        elif self._is_direct:
            self._known[kind] = compiled


def kernel_launcher(
    kernel: Any, constants: dict[str, Any], options: dict[str, Any], target: Target
) -> Launcher:
    """Give the launcher of a kernel with these constants, and options of the compiler."""
    return _kernel_launcher(kernel, tuple(constants.items()), tuple(options.items()), target)


@lru_cache(maxsize=1024)
def _kernel_launcher(kernel: Any, constants: _Items, options: _Items, target: Target) -> Launcher:
    # On AMD, Triton looks at the size of storage too.
    return Launcher(kernel, dict(constants), dict(options), is_direct=target.backend == "cuda")
