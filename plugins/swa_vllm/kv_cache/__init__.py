"""What the engine core runs: the KV cache spec of a windowed layer, the manager of its pages."""
