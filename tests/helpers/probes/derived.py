"""Describe what the plugin serves for a model and engine arguments, one after the other.

Run with torchvision's Python files in the path, which these models import.
"""

import json
from pathlib import Path
from typing import Any

from vllm import LLM

import swa_vllm
from tests.helpers.engines import generate, resolve_here, scheduler, start_engine, stop_engine
from tests.helpers.processes import answer_questions
from tests.helpers.tiny_models import WINDOW, random_prompts

TEXT_ONLY = {"image": 0, "video": 0, "audio": 0}


def _served(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    resolve_here(architecture)
    try:
        return _describe(start_engine(model, limit_mm_per_prompt=TEXT_ONLY, **kwargs))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        stop_engine()


def _describe(llm: LLM) -> dict[str, Any]:
    (windows,) = llm.apply_model(
        lambda m: [x.self_attn.attn.sliding_window for x in m.get_language_model().model.layers]
    )
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
