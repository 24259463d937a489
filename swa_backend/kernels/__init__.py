"""Triton kernels and their launchers; :mod:`swa_backend.ops` validates and allocates."""
