"""Triton kernels, their plans and launchers; :mod:`swa_backend.ops` validates and allocates."""
