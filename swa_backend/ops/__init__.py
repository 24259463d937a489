"""Public operations on paged keys and values: validate, allocate, choose an implementation, launch.

A cache is ``[num_pages, Hkv, page, 2 * D]`` with any strides: of each token and head first the key,
then the value. ``impl`` is ``"triton"``, ``"torch"`` (the oracle, :mod:`swa_backend.reference`), or
``"auto"``: Triton for tensors on a GPU, torch elsewhere. On CPU tensors ``"triton"`` runs in
Triton's interpreter, a debugging aid: set ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from swa_backend.ops.cache_write import write_pages
from swa_backend.ops.compile_ahead import compile_kernels
from swa_backend.ops.decode import decode_attention, decode_scratch_size
from swa_backend.ops.prefill import prefill_attention
from swa_backend.ops.rotate import rotate_back

__all__ = [
    "compile_kernels",
    "decode_attention",
    "decode_scratch_size",
    "prefill_attention",
    "rotate_back",
    "write_pages",
]
