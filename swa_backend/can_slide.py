"""Which Qwen3 cannot have windows at all, by its config."""

from typing import Any

from swa_backend.options import SWAConfigError


def check_can_slide(hf_config: Any) -> None:
    """Refuse a model whose attention is not plain and causal, or whose heads do not fit.

    Args:
        hf_config: a ``Qwen3Config``, a ``Qwen3MoeConfig`` or the text config of a derived model.

    Raises:
        SWAConfigError: what is in the way, with the remedy.
    """
    if hf_config.num_attention_heads % hf_config.num_key_value_heads:
        raise SWAConfigError(
            f"num_attention_heads={hf_config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={hf_config.num_key_value_heads}; correct the checkpoint's "
            "config.json"
        )
    if not getattr(hf_config, "is_causal", True):
        raise SWAConfigError(
            "is_causal=false (bidirectional attention) cannot have a window; remove the window "
            "or is_causal=false"
        )
    if getattr(hf_config, "dual_chunk_attention_config", None):
        raise SWAConfigError(
            "dual_chunk_attention_config cannot be combined with a window; remove either"
        )
