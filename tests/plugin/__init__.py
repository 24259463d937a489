"""Parts of the plugin with vLLM's real classes around them; no model runs."""
