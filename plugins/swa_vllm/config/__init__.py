"""What was decided from vLLM's configuration: one frozen value, read once and handed on."""
