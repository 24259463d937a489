"""Sliding window attention: semantics, configuration, reference (never imports vllm)."""

__version__ = "0.1.0"
