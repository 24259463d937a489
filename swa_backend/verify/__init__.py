"""Compiling the kernels ahead of time and proving them; nothing that serves imports this."""
