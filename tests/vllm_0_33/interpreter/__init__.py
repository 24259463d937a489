"""A Triton backend named "cpu" that compiles nothing: every kernel runs in the interpreter."""
