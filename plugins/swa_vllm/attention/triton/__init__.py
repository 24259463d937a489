"""The attention backend for GPUs, over this project's Triton kernels."""
