"""Hugging Face's ``generate`` as an arm: static batches, padded on the left, its own caches."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from swa_vllm.tools.bench.serving.process import Progress, answer_commands
from swa_vllm.tools.bench.serving.records import Step, Timed

_PADDING = 0  # any token: the mask hides it


class Generator:
    """A model in this process, on its first GPU if there is one."""

    def __init__(self, model: str, dtype: str, batch: int) -> None:
        """Load a checkpoint; ``batch`` requests are served at a time."""
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        )
        self._model.to(self._device).eval()
        self._batch = batch

    def facts(self) -> dict[str, Any]:
        """Describe the model: its threads, its dtype and its batch."""
        return {
            "threads": torch.get_num_threads(),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "batch": self._batch,
        }

    def serve(
        self,
        prompts: list[list[int]],
        outputs: list[int],
        arrivals: list[float],
        on_progress: Progress,
    ) -> dict[str, Any]:
        """Serve all to their end by arrival; a batch starts when all of its requests are there."""
        steps, requests, start = list[Step](), list[Timed](), time.perf_counter()
        for first in range(0, len(prompts), self._batch):
            part = slice(first, first + self._batch)
            lengths, done = outputs[part], sum(outputs[:first])
            time.sleep(max(0.0, arrivals[part][-1] - (time.perf_counter() - start)))
            began = time.perf_counter()
            tokens, ends = self._generate(prompts[part], max(lengths), done, on_progress)
            # Rows whose answer is complete are computed until the longest is; nobody asked for it.
            wanted = [sum(n > index for n in lengths) for index in range(len(ends))]
            seconds = [after - before for before, after in pairwise([began, *ends])]
            prefill, *decode = (
                Step(0, n, n, answered=n, seconds=s) for n, s in zip(wanted, seconds, strict=True)
            )
            steps += [replace(prefill, prefill=sum(map(len, prompts[part])), decode=0), *decode]
            for row, length, arrival in zip(tokens, lengths, arrivals[part], strict=True):
                first_s, last_s = ends[0] - start - arrival, ends[length - 1] - start - arrival
                requests.append(Timed(first_s, last_s, row[:length]))
        return {
            "seconds": time.perf_counter() - start,
            "steps": [asdict(step) for step in steps],
            "requests": [asdict(request) for request in requests],
        }

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], num_tokens: int, num_done: int, on_progress: Progress
    ) -> tuple[list[list[int]], list[float]]:
        """Generate greedy tokens for each prompt, and note the time when each step's were known."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[_PADDING] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        ends: list[float] = []

        def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores.argmax(-1).tolist()  # waits for a GPU
            ends.append(time.perf_counter())
            on_progress(num_done + len(ends) * len(prompts))
            return scores

        made = self._model.generate(
            torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, pad_token_id=_PADDING
            ),
            logits_processor=LogitsProcessorList([note]),
        )
        return made[:, longest:].tolist(), ends


def start_generator(
    threads: int, **arguments: Any
) -> tuple[dict[str, Any], Mapping[str, Callable[..., Any]]]:
    """Load a :class:`Generator` with these arguments; returns its facts and its commands."""
    torch.set_num_threads(threads)
    generator = Generator(**arguments)
    return generator.facts(), {"serve": generator.serve}


if __name__ == "__main__":
    answer_commands(start_generator)
