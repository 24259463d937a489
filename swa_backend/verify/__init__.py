"""What compiles the kernels ahead of time and proves them; nothing that serves imports it."""
