"""The attention backend of windowed layers for each implementation."""

from vllm.v1.attention.backend import AttentionBackend

from swa_vllm.config.implementation import Implementation


def windowed_backend(implementation: Implementation) -> type[AttentionBackend] | None:
    """The backend of windowed layers, imported only if it runs; None leaves the choice to vLLM."""
    if implementation is Implementation.KERNELS:
        from swa_vllm.attention.triton.backend import SWATritonBackend

        return SWATritonBackend
    if implementation is Implementation.CPU_OPERATORS:
        from swa_vllm.attention.cpu.backend import SWACPUBackend

        return SWACPUBackend
    return None
