"""How metadata builders of Model Runner V1 come to know the prompt's length of each request."""

from vllm.config import ModelConfig

# Backends that know vLLM's own kind of window, and so may serve full layers beside a phase.
RSWA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")


def send_prompt_lens(model_config: ModelConfig) -> None:
    """Have ``CommonAttentionMetadata.rswa_prefix_lens`` given to builders in each step.

    vLLM (0.32, 0.33) gives it to models with a window of its own kind (R-SWA), which backends that
    know one then apply to every full layer: this one no text outgrows.
    """
    for config in (model_config.model_arch_config, model_config.hf_config):
        config.rswa_window = model_config.max_model_len
