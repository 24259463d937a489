"""Sliding window attention without an engine: window, pages, oracle, kernels. Imports no vllm."""

__version__ = "0.2.0"
