"""Describe what the plugin serves for a model and engine arguments, one after the other.

Run with torchvision's Python files in the path, which these models import.
"""

import json
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.model_executor.models.interfaces import supports_multimodal

import swa_vllm
from tests.helpers.engines import generate, resolve_here, scheduler, start_engine, stop_engine
from tests.helpers.processes import answer_questions
from tests.helpers.tiny_models import WINDOW, random_prompts


def _served(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    resolve_here(architecture)
    try:
        return _describe(start_engine(model, **kwargs))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        stop_engine()


def _windows(model: Any) -> list[int | None]:
    """The window of each layer that attends."""
    text = model.get_language_model() if supports_multimodal(model) else model
    layers = [layer for layer in text.model.layers if hasattr(layer, "self_attn")]
    return [layer.self_attn.attn.sliding_window for layer in layers]


def _describe(llm: LLM) -> dict[str, Any]:
    (windows,) = llm.apply_model(_windows)
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    prompts = random_prompts((1, WINDOW + 1, 4 * WINDOW))
    result: dict[str, Any] = {
        "windows": windows,
        "specs": sorted({type(group.kv_cache_spec).__name__ for group in groups}),
    }
    if llm.llm_engine.model_config.runner_type == "generate":
        result["answers"] = [(a.tokens, a.logprobs) for a in generate(llm, prompts)]
    else:
        outputs = llm.encode(
            [{"prompt_token_ids": p} for p in prompts], pooling_task="token_embed", use_tqdm=False
        )
        result["embeddings"] = [output.outputs.data.tolist() for output in outputs]
    return result


if __name__ == "__main__":
    swa_vllm.register()
    answer_questions(_served)
