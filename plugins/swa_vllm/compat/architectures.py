"""The architectures that are, or contain, a Qwen3, and which class serves each."""

from collections.abc import Sequence
from typing import Any

# Architectures, and vLLM's class for each: of the text stack's attention layers all may slide ...
HYBRID = {
    name: name
    for name in (
        *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
        *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    )
}
WINDOWED = {
    **HYBRID,
    "ColQwen3": "ColQwen3Model",
    "OpsColQwen3Model": "ColQwen3Model",
    "Qwen3ASRForConditionalGeneration": "Qwen3ASRForConditionalGeneration",
    "Qwen3ASRForcedAlignerForTokenClassification": "Qwen3ASRForcedAlignerForTokenClassification",
    "Qwen3ASRRealtimeGeneration": "Qwen3ASRRealtimeGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLNemotronEmbedModel": "ColQwen3Model",
}
# ... or a Qwen3 that was not tested with windows.
UNPROVEN = {
    "FunASRForConditionalGeneration": "FunASRForConditionalGeneration",
    "InternS1ProForConditionalGeneration": "InternS1ProForConditionalGeneration",
    "JinaEmbeddingsV5Model": "JinaEmbeddingsV5Model",
    "JinaForRanking": "JinaForRanking",
    "MiniCPMV": "MiniCPMV",
    "MossAudioModel": "MossAudioModel",
    "VoyageQwen3BidirectionalEmbedModel": "VoyageQwen3BidirectionalEmbedModel",
}
# How vLLM names the layers of a draft model.
DRAFT_PREFIX = "draft_model."
PLAIN = {
    "Qwen3ForCausalLM": "swa_vllm.models.qwen3:SWAQwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "swa_vllm.models.qwen3_moe:SWAQwen3MoeForCausalLM",
}
MODELS = {
    **PLAIN,
    **{name: f"swa_vllm.models.derived:{stock}" for name, stock in WINDOWED.items()},
    **{name: f"swa_vllm.models.guard:Unproven{stock}" for name, stock in UNPROVEN.items()},
}
GUARDS = {
    name: f"swa_vllm.models.guard:Untested{stock}"
    for name, stock in {**dict(zip(PLAIN, PLAIN, strict=True)), **WINDOWED, **UNPROVEN}.items()
}
# Endings of architectures, of which vLLM takes one for another that it knows, in its order.
ENDINGS = (
    *("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel", "ForTextEncoding"),
    *("EmbeddingModel", "ForSequenceClassification", "ForTokenClassification"),
    *("ForAudioClassification", "ForImageClassification", "ForVideoClassification"),
    *("ClassificationModel", "ForRewardModeling", "RewardModel", "Model"),
)


def has_windows(architecture: str) -> bool:
    """Whether this plugin serves an architecture with windows, without asking vLLM."""
    served = {*PLAIN, *WINDOWED}
    ending = next((ending for ending in ENDINGS if architecture.endswith(ending)), None)
    return architecture in served or (
        ending is not None
        and any(architecture.replace(ending, other) in served for other in ENDINGS)
    )


def check_architectures(architectures: Sequence[str]) -> None:
    """Refuse a checkpoint of an architecture that is, or contains, no Qwen3.

    Raises:
        ValueError: none of the architectures is one.
    """
    if architectures and not any(map(has_windows, architectures)):
        raise ValueError(
            f"architectures {', '.join(architectures)}: not served with windows, though its layers "
            f"are a Qwen3's; those of {', '.join((*PLAIN, *WINDOWED))} are. Give the config.json "
            "of one"
        )


def phase_refused(phase: str, architectures: Sequence[str]) -> str | None:
    """Say that a window in one phase only was not tested with a model; None where it was.

    Args:
        phase: the option that asks for it.
    """
    proven = (*PLAIN, *HYBRID)
    if set(architectures) & set(proven):
        return None
    named = ", ".join(architectures) or "a checkpoint that names no architecture"
    return f"{phase} was not tested with {named}, only with {', '.join(proven)}; remove phase"


def registered_class(architecture: str) -> str | None:
    """``module:class`` that vLLM's model registry holds for an architecture, or None."""
    from vllm import ModelRegistry  # here only: tools read these tables where there is no vLLM

    entry: Any = ModelRegistry.models.get(architecture)
    if entry is None:
        return None
    if hasattr(entry, "module_name"):
        return f"{entry.module_name}:{entry.class_name}"
    return f"{entry.model_cls.__module__}:{entry.model_cls.__qualname__}"
