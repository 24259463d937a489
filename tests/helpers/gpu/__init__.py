"""What `tests/gpu.sh` runs on a machine with a GPU, and how it is recorded."""
