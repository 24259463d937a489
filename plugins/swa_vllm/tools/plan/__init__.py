"""``swa plan``: the KV cache of a model and what runs in it, from config.json alone."""
