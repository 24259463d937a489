"""Small real parts of vLLM (a scheduler, a layer, an engine), and what measures on them."""
