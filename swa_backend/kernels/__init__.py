"""Triton kernels, plans and launchers; :mod:`swa_backend.ops` validates and allocates."""
