"""Cases of the kernels, what watches their memory, and mutants of them."""
