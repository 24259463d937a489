"""The attention backend for CPUs, over vLLM's C++ operators."""
