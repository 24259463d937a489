"""What a worker runs: the windowed attention layer, its backends, and what they share."""
