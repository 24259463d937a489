"""Describe what the plugin serves for each [model, engine arguments] of a JSON object.

Run with torchvision's Python files in the path, which these models import.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM

import swa_vllm
from tests.helpers.engines import generate, resolve_here, scheduler, start_engine, stop_engine
from tests.helpers.tiny_models import WINDOW, random_prompts


def main() -> None:
    swa_vllm.register()
    results = {}
    for name, (model, kwargs) in json.loads(sys.argv[1]).items():
        (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
        resolve_here(architecture)
        try:
            llm = start_engine(model, limit_mm_per_prompt=TEXT_ONLY, **kwargs)
            results[name] = _describe(llm)
            del llm
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        stop_engine()
    print(json.dumps(results))


TEXT_ONLY = {"image": 0, "video": 0, "audio": 0}


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
    main()
