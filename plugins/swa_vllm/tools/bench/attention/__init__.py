"""One attention call, timed beside others' kernels."""
