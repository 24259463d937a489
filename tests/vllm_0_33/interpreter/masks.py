"""Masks of vLLM's kernels, as Triton's interpreter takes them."""

from typing import Any


def accept_integers() -> None:
    """Let loads and stores of the interpreter take ``mask & mask``, which it widens to an integer.

    A compiler narrows such a mask again. Kernels of vLLM that verify drafts have some, this
    project's have none. vLLM calls this as a plugin, in every process.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    if getattr(InterpreterBuilder, "accepts_integer_masks", False):
        return
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def narrow(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, pointers, narrow(mask), *args, **kwargs)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, pointers, value, narrow(mask), *args)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
    InterpreterBuilder.accepts_integer_masks = True
