"""What the engine core runs: the KV cache spec of windowed layers and their page manager."""
