"""A Triton backend named "cpu" that compiles nothing: every kernel runs in Triton's interpreter.

Without a backend of that name vLLM switches Triton off on a CPU, and Model Runner V2, whose own
kernels are written in it, refuses to start. The real one (triton-cpu) is on no package index. Its
entry point is on the path only where the tests run V2.
"""
