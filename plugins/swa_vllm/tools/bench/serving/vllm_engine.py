"""A vLLM engine as an arm: it serves a workload and says what each step and request took.

Whether this plugin is in it decides ``VLLM_PLUGINS``, as for any vLLM.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from swa_backend.pages import ceil_div
from swa_vllm.tools.bench.serving.process import Progress, answer_commands
from swa_vllm.tools.bench.serving.records import Step, Timed
from swa_vllm.tools.bench.serving.workload import make_workload_prompts

_VOCABULARY = 500  # of prompts whose sense does not matter; no model has less


class RecordingScheduler(Scheduler):
    """vLLM's scheduler, with a record of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Step] = []

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        decode = sum(map(self._is_decode, output.num_scheduled_tokens.items()))
        pool = self.kv_cache_manager.block_pool
        self.steps.append(
            Step(
                prefill=output.total_num_scheduled_tokens - decode,
                decode=decode,
                requests=len(output.num_scheduled_tokens),
                pages=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                preempted=len(output.preempted_req_ids or ()),
            )
        )
        return output

    def _is_decode(self, scheduled: tuple[str, int]) -> bool:
        name, num_tokens = scheduled
        request = self.requests[name]
        # Counted already: num_computed_tokens is that behind the step.
        return num_tokens == 1 and request.num_computed_tokens > request.num_prompt_tokens


class SteppedEngine:
    """An engine in this process that is stepped by hand."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.llm_engine
        self._scheduler: RecordingScheduler = self._engine.engine_core.engine_core.scheduler
        self._count = 0

    def facts(self) -> dict[str, Any]:
        """Describe the engine: its KV cache specs, the pages and bytes of its pool, its threads."""
        config = self._scheduler.kv_cache_config
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        return {
            "specs": sorted({type(spec).__name__ for spec in specs}),
            "spare_tokens": max(getattr(spec, "spare_tokens", 0) for spec in specs),
            "num_pages": config.num_blocks,
            "pool_bytes": sum(tensor.size for tensor in config.kv_cache_tensors),
            "threads": torch.get_num_threads(),
            "dtype": str(self._engine.model_config.dtype).removeprefix("torch."),
        }

    def serve(
        self,
        prompts: list[list[int]],
        outputs: list[int],
        arrivals: list[float],
        on_progress: Progress,
    ) -> dict[str, Any]:
        """Serve all to their end, and record steps and what each request took.

        Args:
            outputs: tokens of each answer.
            arrivals: seconds from now, in ascending order.
        """
        self._scheduler.steps.clear()
        timed: dict[str, Timed] = {}
        arrived: dict[str, float] = {}
        waiting = list(zip(prompts, outputs, arrivals, strict=True))[::-1]
        num_tokens, start = 0, time.perf_counter()
        while waiting or self._engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while waiting and waiting[-1][2] <= now:
                prompt, num_output, arrival = waiting.pop()
                name = self._add(prompt, num_output)
                arrived[name], timed[name] = arrival, Timed()
            if not self._engine.has_unfinished_requests():
                time.sleep(waiting[-1][2] - now)
                continue
            began = time.perf_counter()
            answers = self._engine.step()
            ended = time.perf_counter()
            step = self._scheduler.steps[-1]
            step.seconds = ended - began
            for output in answers:
                request, new = timed[output.request_id], output.outputs[0].token_ids
                request.last = ended - start - arrived[output.request_id]
                request.first = request.first or request.last
                request.tokens += new
                step.answered += len(new)
            num_tokens += step.answered
            on_progress(num_tokens)
        return {
            "seconds": time.perf_counter() - start,
            "steps": [asdict(step) for step in self._scheduler.steps],
            "requests": [asdict(request) for request in timed.values()],
        }

    def decode(
        self, batch: int, num_prompt: int, num_steps: int, seed: int, on_progress: Progress
    ) -> dict[str, Any]:
        """Prefill ``batch`` random prompts and decode behind all of them together.

        Returns:
            ``prefill_s``, seconds of a prompt token; ``decode_s``, seconds of a step, the median
            of those with the most requests, but the first; ``batch``, how many these were, as a
            pool may not hold all at once; ``tokens`` of each answer.
        """
        prompts = make_workload_prompts([num_prompt] * batch, _VOCABULARY, seed)
        # The first go on until the last prompt is computed, where max_model_len lets them.
        chunks = ceil_div(batch * num_prompt, self._scheduler.max_num_scheduled_tokens)
        num_output = min(chunks + num_steps + 1, self._scheduler.max_model_len - num_prompt)
        served = self.serve(prompts, [num_output] * batch, [0.0] * batch, on_progress)
        steps = [Step(**step) for step in served["steps"]]
        prefill = [step for step in steps if step.prefill]
        alone = [step for step in steps if not step.prefill]
        most = max(step.decode for step in alone)
        full = [step.seconds for step in alone if step.decode == most]
        return {
            "prefill_s": sum(s.seconds for s in prefill) / sum(s.prefill for s in prefill),
            "decode_s": statistics.median(full[1:] or full),
            "batch": most,
            "tokens": [request["tokens"] for request in served["requests"]],
        }

    def _add(self, prompt: list[int], num_output: int) -> str:
        self._count += 1
        name = str(self._count)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name


def start_stepped_engine(
    threads: int, **arguments: Any
) -> tuple[dict[str, Any], Mapping[str, Callable[..., Any]]]:
    """Start an engine with these arguments of ``LLM``; returns its facts and its commands."""
    torch.set_num_threads(threads)
    llm = LLM(
        **arguments,
        skip_tokenizer_init=True,
        enforce_eager=True,
        async_scheduling=False,  # a step's time is then its own
        scheduler_cls="swa_vllm.tools.bench.serving.vllm_engine.RecordingScheduler",
    )
    engine = SteppedEngine(llm)
    return engine.facts(), {"serve": engine.serve, "decode": engine.decode}


if __name__ == "__main__":
    answer_commands(start_stepped_engine)
