"""``swa trace``: which pages each request holds over time, by vLLM's real scheduler."""
