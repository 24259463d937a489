"""A small real part of vLLM (a scheduler, a layer, an engine), and what is measured on it."""
