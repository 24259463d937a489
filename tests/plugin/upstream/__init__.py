"""Where vLLM's own tests of sliding windows are answered by this plugin, as README.md lists."""
