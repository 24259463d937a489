"""vLLM's own classes of the models that are, or contain, a Qwen3."""

from importlib import import_module
from typing import Any

# Class, and the module of vllm.model_executor.models that defines it.
STOCK = {
    "ColQwen3Model": "colqwen3",
    "FunASRForConditionalGeneration": "funasr",
    "InternS1ProForConditionalGeneration": "interns1_pro",
    "JinaEmbeddingsV5Model": "jina",
    "JinaForRanking": "jina",
    "MiniCPMV": "minicpmv",
    "MossAudioModel": "moss_audio",
    "Qwen3ASRForConditionalGeneration": "qwen3_asr",
    "Qwen3ASRForcedAlignerForTokenClassification": "qwen3_asr_forced_aligner",
    "Qwen3ASRRealtimeGeneration": "qwen3_asr_realtime",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "qwen3_omni_moe_thinker",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "VoyageQwen3BidirectionalEmbedModel": "voyage",
}


def stock_class(name: str) -> Any:
    """vLLM's class ``name``; only its own module is imported.

    Raises:
        AttributeError: not in :data:`STOCK`; the error that a module's ``__getattr__`` owes.
    """
    if name not in STOCK:
        raise AttributeError(f"no vLLM model class {name} is known here")
    return getattr(import_module(f"vllm.model_executor.models.{STOCK[name]}"), name)
