"""Facts about vLLM and the environment variables that matter; imports nothing else of ours."""
