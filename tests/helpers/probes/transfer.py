"""One of two servers that exchange pages over NIXL: an engine in this process that is asked."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Histogram

from tests.helpers.engines import (
    attention_layers,
    counting_preemptions,
    greedy,
    managers,
    num_held_pages,
    scheduler,
    start_engine,
    to_answer,
)
from tests.helpers.processes import answer_questions

SETTLE_S = 60
_engines: list[LLM] = []


def _start(model: str, arguments: dict[str, Any]) -> None:
    llm = start_engine(Path(model), disable_log_stats=False, **arguments)
    _engines.append(llm)
    if not scheduler(llm).vllm_config.kv_transfer_config.is_kv_consumer:
        return
    if arguments.get("tensor_parallel_size", 1) == 1:
        # Where pages arrive free pages are not poisoned, and what nobody sees is this page only.
        for layer in attention_layers(llm):
            layer.kv_cache[0].fill_(torch.nan)


def _serve(
    prompts: list[list[int]], num_tokens: int, transfers: list[dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """Answer prompts; ``transfers`` says of each what another server has or shall get."""
    sampling = [
        greedy(num_tokens, extra_args={"kv_transfer_params": transfer} if transfer else None)
        for transfer in transfers
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = _engines[0].generate(inputs, sampling, use_tqdm=False)
    served = []
    for output in outputs:
        (completion,) = output.outputs
        answer = to_answer(completion, output.num_cached_tokens or 0)
        served.append(
            {
                "tokens": answer.tokens,
                "logprobs": answer.logprobs,
                "num_cached_tokens": answer.num_cached_tokens,
                "transfer": output.kv_transfer_params,
                "reason": completion.finish_reason,
            }
        )
    return served


def _serve_preempted(*given: Any) -> tuple[list[dict[str, Any]], int]:
    """As ``serve``; once every answer has begun, all start over.

    Returns:
        What was served, and how many requests started over.
    """
    client, is_due = _engines[0].llm_engine.engine_core, True
    get_output = client.get_output

    def preempting() -> Any:
        nonlocal is_due
        outputs = get_output()
        requests = scheduler(_engines[0]).requests.values()
        if is_due and requests and all(request.num_output_tokens > 1 for request in requests):
            is_due = False
            scheduler(_engines[0]).reset_prefix_cache(reset_running_requests=True)
        return outputs

    with counting_preemptions(_engines[0]) as preempted:
        client.get_output = preempting
        try:
            return _serve(*given), len(preempted)
        finally:
            del client.get_output


def _abandon(prompt: list[int], transfer: dict[str, Any]) -> None:
    """Take a request and abort it before a step is scheduled."""
    engine = _engines[0].llm_engine
    params = SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": transfer})
    request_id = engine.add_request(str(10**9), {"prompt_token_ids": prompt}, params)
    engine.abort_request([request_id])
    while engine.has_unfinished_requests():
        engine.step()


def _begin(prompts: list[list[int]], transfers: list[dict[str, Any]]) -> None:
    """Take requests, and schedule one step: their pages are being read."""
    engine = _engines[0].llm_engine
    for number, (prompt, transfer) in enumerate(zip(prompts, transfers, strict=True)):
        params = SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": transfer})
        engine.add_request(f"begun {number}", {"prompt_token_ids": prompt}, params)
    engine.step()


def _settle() -> dict[str, int]:
    """Step until no request is left, not even one whose pages another server has yet to read.

    Returns:
        Pages that are held then, and what the managers of windowed layers counted.
    """
    core = _engines[0].llm_engine.engine_core.engine_core
    deadline = time.monotonic() + SETTLE_S
    while scheduler(_engines[0]).requests and time.monotonic() < deadline:
        core.step_fn()
        time.sleep(0.005)
    counts = [manager.snapshot() for manager in managers(_engines[0])]
    return {
        "held": num_held_pages(_engines[0]),
        "requests": len(scheduler(_engines[0]).requests),
        **{
            name: sum(getattr(count, name) for count in counts)
            for name in (
                "allocated",
                "live",
                "requests_live",
                "freed_by_window",
                "prefix_hit_tokens",
            )
        },
        "peak": max(count.peak_live_per_request for count in counts),
    }


def _bytes_read() -> int:
    """Bytes that this server read from others since it started."""
    (histogram,) = (
        metric
        for metric in _engines[0].get_metrics()
        if metric.name == "vllm:nixl_bytes_transferred"
    )
    assert isinstance(histogram, Histogram)
    return int(histogram.sum)


QUESTIONS: dict[str, Callable[..., Any]] = {
    "start": _start,
    "serve": _serve,
    "serve preempted": _serve_preempted,
    "abandon": _abandon,
    "begin": _begin,
    "settle": _settle,
    "bytes read": _bytes_read,
}


def answer(question: str, *given: Any) -> Any:
    """Do what is asked by name."""
    return QUESTIONS[question](*given)


if __name__ == "__main__":
    answer_questions(answer)
