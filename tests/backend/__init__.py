"""``swa_backend`` alone: the window, page arithmetic, operations and kernels."""
