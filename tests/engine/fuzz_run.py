"""One case of :mod:`tests.engine.fuzz_cases` in the real engine, against a dense model."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.prompt_window import PromptWindowManager
from tests.engine.fuzz_cases import Case, Job
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.engines import managers, scheduler, to_answer
from tests.helpers.page_checks import (
    check_counts,
    check_held,
    check_held_by_answer,
    check_nothing_held,
)

MAX_STEPS = 5000  # of a batch
FREED_BY_ANSWERS = "pages freed behind a prompt"  # and steps of requests that lack some


@dataclass
class Scored:
    """Log-probabilities that the engine gave of the tokens from position ``first`` of a text.

    The prompt is ``num_prompt`` tokens long.
    """

    text: list[int]
    num_prompt: int
    first: int
    logprobs: list[float]
    is_greedy: bool

    def chosen(self, rows: torch.Tensor) -> torch.Tensor:
        """Of what a model says of every token of the text and its successors, these tokens'."""
        tokens = torch.tensor(self.text[self.first :])[:, None]
        return rows[self.first - 1 : -1].gather(1, tokens)[:, 0]


@dataclass
class Run:
    """Serves the batches of a case; counts what happened.

    Attributes:
        llm: the engine of the case.
        happened: how often, by name.
    """

    case: Case
    llm: LLM
    happened: Counter[str] = field(default_factory=Counter)

    def serve(self) -> list[Scored]:
        """All that the engine said; its pages are checked at every step and after every batch."""
        scored, cache = list[Scored](), scheduler(self.llm).kv_cache_manager
        with self._watched():
            for number, jobs in enumerate(self.case.batches):
                scored += self._serve(jobs, seed=10 * number)
                check_nothing_held(cache.block_pool, cache.coordinator.single_type_managers)
        for counts in (manager.snapshot() for manager in managers(self.llm)):
            self.happened["skipped pages"] += counts.skipped
            self.happened["pages freed by a window"] += counts.freed_by_window
        return scored

    def _serve(self, jobs: Sequence[Job], seed: int) -> list[Scored]:
        engine, outputs = self.llm.llm_engine, dict[tuple[str, int], RequestOutput]()
        prompts = [job.prompt(seed + i) for i, job in enumerate(jobs)]
        for step in count():
            assert step < MAX_STEPS, "stuck"
            for i, job in enumerate(jobs):
                if job.starts_at == step:
                    engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, _params(job))
                    self.happened["requests"] += 1
                if job.aborted_at == step and step and engine.has_unfinished_requests():
                    engine.abort_request([str(i)])
                    self.happened["aborts"] += 1
            for output in engine.step():
                for completion in output.outputs:
                    outputs[output.request_id, completion.index] = output
            if step > max(job.starts_at for job in jobs) and not engine.has_unfinished_requests():
                break
        engine.step()  # takes back what was aborted last
        return [
            part
            for (name, index), output in outputs.items()
            for part in _scored(prompts[int(name)], jobs[int(name)], output, index)
        ]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Check all pages after each step that the scheduler makes, and count events."""
        own = scheduler(self.llm)
        schedule, allocate = own.schedule, own.kv_cache_manager.allocate_slots

        def checked(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._check_step(own.requests, output)
            return output

        def counted(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            self.happened["shortages of pages"] += blocks is None
            return blocks

        with (
            mock.patch.object(own, "schedule", checked),
            mock.patch.object(own.kv_cache_manager, "allocate_slots", counted),
        ):
            yield

    def _check_step(self, requests: Mapping[str, Request], output: SchedulerOutput) -> None:
        self.happened["steps"] += 1
        self.happened["preemptions"] += len(output.preempted_req_ids or ())
        admitted = {request.req_id for request in output.scheduled_new_reqs}
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        for manager in managers(self.llm):
            check_counts(manager)
            for name, num_tokens in output.num_scheduled_tokens.items():
                request = requests[name]
                settled = request.num_computed_tokens - request.num_in_flight_tokens
                check_held(manager, name, settled)
                if name in admitted:
                    self._count_hit(manager, request, request.num_computed_tokens - num_tokens)
        for manager in scheduler(self.llm).kv_cache_manager.coordinator.single_type_managers:
            if not isinstance(manager, PromptWindowManager):
                continue
            for name in output.num_scheduled_tokens:
                request = requests[name]
                settled = request.num_computed_tokens - request.num_in_flight_tokens
                check_held_by_answer(manager, request, settled)
                table = manager.req_to_blocks[name]
                self.happened[FREED_BY_ANSWERS] += any(block.is_null for block in table)

    def _count_hit(self, manager: SWAManager, request: Request, num_tokens: int) -> None:
        """Count a hit of ``num_tokens`` tokens; it may lie across pages that no cache has."""
        hit = manager.req_to_blocks[request.request_id][: num_tokens // manager.block_size]
        hashes = manager._page_hashes(request)
        freed = [i for i, block in enumerate(hit) if block.is_null]
        self.happened["prefix hits"] += len(hit) > 0
        self.happened["hits across freed pages"] += any(
            not manager._is_cached(hashes[i]) for i in freed
        )


def _params(job: Job) -> SamplingParams:
    return SamplingParams(
        n=job.num_samples,
        temperature=0.0 if job.num_samples == 1 else 1.0,
        max_tokens=job.num_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if job.scores_prompt else None,
        detokenize=False,
    )


def _scored(prompt: list[int], job: Job, output: RequestOutput, index: int) -> list[Scored]:
    (completion,) = (c for c in output.outputs if c.index == index)
    answer = to_answer(completion)
    text, is_greedy = prompt + answer.tokens, job.num_samples == 1
    parts = [Scored(text, len(prompt), len(prompt), answer.logprobs, is_greedy)]
    if output.prompt_logprobs is not None:
        entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        logprobs = [entry[token].logprob for entry, token in entries]
        parts.append(Scored(prompt, len(prompt), 1, logprobs, False))
    return parts


@dataclass(frozen=True)
class Errors:
    """Differences from a dense model in fp64: the engine's, and that model's own in its dtype.

    Attributes:
        largest: of the engine's log-probabilities.
        choice: by which a token that it took for the most likely is less likely than the best.
        usual: root mean square of those of its log-probabilities.
        largest_noise: of the dense model's log-probabilities, of whatever token.
        usual_noise: root mean square, of the tokens that the engine's are of.
        num_tokens: how many these are.
    """

    largest: float
    choice: float
    usual: float
    largest_noise: float
    usual_noise: float
    num_tokens: int


def measure(
    case: Case, model: Path, scored: Sequence[Scored], orders: Sequence[int | None] = (None,)
) -> Errors:
    """Compare what the engine said with the dense model of the case.

    Args:
        orders: of the hidden units of the models that tell the noise, see :class:`DenseText`.
    """
    exact = DenseText(model, torch.float64)
    rounded = [DenseText(model, getattr(torch, case.dtype), order) for order in orders]
    choices, largest_noises, errors, noises = [0.0], [0.0], [], []
    for part in scored:
        args = part.text, range(len(part.text))
        sight = Sight(
            case.windows,
            case.sinks,
            case.shift,
            phase=case.phase,
            prompt_len=part.num_prompt,
        )
        # An engine turns shifted queries back, whose angles so are rounded twice.
        sights = [sight, replace(sight, turns_back=True)] if case.shift else [sight]
        rows = exact.scores(*args, sight)
        # [orders, tokens, vocabulary]
        noise = sum(
            (rows - torch.stack([other.scores(*args, s) for other in rounded])).abs()
            for s in sights
        )
        best, chosen = rows.max(dim=-1).values, part.chosen(rows)
        errors.append(torch.tensor(part.logprobs, dtype=torch.float64) - chosen)
        noises.append(part.chosen(noise.square().mean(dim=0).sqrt()))
        largest_noises.append(float(noise.max()))
        if part.is_greedy:
            choices.append(float((best[part.first - 1 : -1] - chosen).max()))
    all_errors, all_noises = torch.cat(errors), torch.cat(noises)
    return Errors(
        float(all_errors.abs().max()),
        max(choices),
        float(all_errors.square().mean().sqrt()),
        max(largest_noises),
        float(all_noises.square().mean().sqrt()),
        len(all_noises),
    )
