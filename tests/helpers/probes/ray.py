"""Serve each [model, engine arguments] of a JSON object over Ray, and describe what happened.

The answer is written to a file, as JSON. The engine is in this process; its workers are Ray's.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import ray
from vllm import LLM
from vllm.v1.executor import ray_utils

from tests.helpers.engines import generate, managers, num_free_pages, start_engine, stop_engine
from tests.helpers.stages import make_stage_buffers, stages_allowed
from tests.helpers.tiny_models import PAGE_SIZE, random_prompts

NO_POISON = {"debug_poison": False}  # it needs the engine's page managers in the worker's process
SHORT, LONG = 9 * PAGE_SIZE, 13 * PAGE_SIZE  # both above 255: pickle writes smaller numbers shorter
# vLLM waits half an hour for devices that may yet come.
ray_utils.PG_WAIT_TIMEOUT = 5


def main() -> None:
    lengths, cases = json.loads(sys.argv[1])
    results = {}
    for name, (model, kwargs) in cases.items():
        options = kwargs.pop("additional_config", {}).get("swa", {})
        try:
            with stages_allowed():
                llm = start_engine(
                    model,
                    distributed_executor_backend="ray",
                    additional_config={"swa": {**options, **NO_POISON}},
                    **kwargs,
                )
            if kwargs.get("pipeline_parallel_size", 1) > 1:
                make_stage_buffers(llm.collective_rpc)
            results[name] = _describe(llm, random_prompts(lengths))
            llm.llm_engine.model_executor.shutdown()
            del llm
        except Exception as error:
            results[name] = {"error": str(error)}
        stop_engine()
        ray.shutdown()  # gives the placement group back, which vLLM keeps
    Path(sys.argv[2]).write_text(json.dumps(results))


def _describe(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    executor = llm.llm_engine.model_executor
    specs = llm.collective_rpc("get_kv_cache_spec")
    num_free = num_free_pages(llm)
    answers, again = generate(llm, prompts), generate(llm, prompts)
    return {
        "executor": type(executor).__name__,
        "nodes": sorted({handle.node_id for handle in executor.ray_worker_handles}),
        "specs": [{name: repr(spec) for name, spec in worker.items()} for worker in specs],
        "num_kv_heads": [[spec.num_kv_heads for spec in worker.values()] for worker in specs],
        "freed_by_window": [m.snapshot().freed_by_window for m in managers(llm)],
        "answers": [(a.tokens, a.logprobs) for a in answers],
        "again": [a.tokens for a in again],
        "cached_tokens": [a.num_cached_tokens for a in again],
        "leaked_pages": num_free - num_free_pages(llm),
        "step_bytes": {n: _step_bytes(llm, n) for n in (SHORT, LONG)},
    }


def _step_bytes(llm: LLM, num_prompt_tokens: int) -> list[int]:
    """Bytes that workers are sent for each step of decoding the next page after a prompt."""
    executor: Any = llm.llm_engine.model_executor
    sent = []

    def recording(method: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "execute_model":
            sent.append(len(pickle.dumps(kwargs["args"])))
        return type(executor).collective_rpc(executor, method, *args, **kwargs)

    executor.collective_rpc = recording
    try:
        (prompt,) = random_prompts([num_prompt_tokens], seed=num_prompt_tokens)
        generate(llm, [prompt], num_tokens=PAGE_SIZE)
    finally:
        del executor.collective_rpc
    return sent[-(PAGE_SIZE - 1) :]


if __name__ == "__main__":
    main()
