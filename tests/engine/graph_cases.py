"""What engines serve from CUDA graphs: on a GPU, and on a CPU from the graphs of
:mod:`tests.helpers.graphs`."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from vllm import LLM

from swa_vllm.attention.triton.backend import SWATritonBackend
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.eagle3 import NUM_DRAFTED, eagle3_config
from tests.helpers.engines import (
    attention_layers,
    counting_preemptions,
    generate,
    num_free_pages,
    resolve_here,
)
from tests.helpers.exactness import check_exact
from tests.helpers.tiny_models import FULL, VOCAB_SIZE, random_prompts

# Graphs of requests that decode, and no compilation.
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
# A NaN is looked for on the host, which no graph can do.
OPTIONS: dict[str, Any] = {"impl": "triton", "debug_poison": False}


@dataclass(frozen=True)
class Case:
    """An engine, and what it is asked.

    Attributes:
        options: the plugin's options.
        lengths: of the prompts, all of which are asked at once.
        num_tokens: of each answer.
        num_layers: of the model.
        arguments: of ``LLM``.
        drafts: how many drafted tokens are right, step after step; without, nothing is drafted.
        is_preempted: whether the pool is so small that a request has to start over.
    """

    options: dict[str, Any]
    lengths: tuple[int, ...]
    num_tokens: int = 5
    num_layers: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)
    drafts: tuple[int, ...] = ()
    is_preempted: bool = False


SINKS = {"window": 20, "sink_tokens": 4}
MIXED = {**SINKS, "full_attention_layers": "every:2"}
DRAFTED = Case(SINKS, (7, 29, 40), 8, num_layers=4)
# Turned back over more tokens, shifted queries have more rounding than the dense model whose fp32
# noise is allowed.
CASES = {
    "window": Case({"window": 40, "prefill_pages": "survivors"}, (1, 39, 100)),
    "sinks": Case(SINKS, (1, 24, 60)),
    "shifted sinks": Case({**SINKS, "position_shift": True}, (1, 39, 80)),
    "mixed layers": Case(MIXED, (1, 24, 60)),
    "prompt only": Case({**MIXED, "phase": "prefill"}, (1, 24, 60)),
    "fp8 cache": Case(
        {"window": 20},
        (5, 39, 60),
        num_layers=1,
        arguments={"kv_cache_dtype": "fp8", "max_num_batched_tokens": 512},
    ),
    "preempted": Case(
        {**MIXED, "prefill_pages": "survivors"},
        (29, 30, 31),
        arguments={
            "num_gpu_blocks_override": 10,
            "max_model_len": 64,
            "async_scheduling": False,  # one step in flight, for which the pool is made
        },
        is_preempted=True,
    ),
    "prompt only, preempted": Case(
        {"window": 20, "phase": "prefill"},
        (29, 30, 31),
        num_tokens=40,
        arguments={
            "num_gpu_blocks_override": 7,
            "max_model_len": 96,
            "async_scheduling": False,
        },
        is_preempted=True,
    ),
    "answer only, preempted": Case(
        {"window": 20, "phase": "decode"},
        (29, 30, 31),
        num_tokens=60,  # until a page has left the window
        arguments={
            "num_gpu_blocks_override": 7,
            "max_model_len": 96,
            "async_scheduling": False,
        },
        is_preempted=True,
    ),
    "drafts": replace(DRAFTED, drafts=(0, 1, 2, 3)),
    "drafts, all rejected": replace(DRAFTED, num_tokens=4, drafts=(0,)),
    "drafts, all accepted": replace(DRAFTED, num_tokens=9, drafts=(3,)),
    "drafts longer than the window": replace(DRAFTED, options={"window": 2}, drafts=(0, 1, 2, 3)),
}
# The same of more layers, with more and longer requests.
LONG = {
    name: replace(CASES[name], lengths=lengths, num_tokens=24, num_layers=4)
    for name, lengths in (("window", (1, 39, 41, 100, 230)), ("shifted sinks", (1, 24, 39, 41, 80)))
} | {"answer only": Case({**MIXED, "window": 2, "phase": "decode"}, (1, 24, 60))}


def run(case: Case, mode: dict[str, Any], start: Any, model: Path, directory: Path) -> float:
    """Assert that an engine answers as a dense model does, and gives every page back.

    Args:
        case: what to ask.
        mode: arguments of ``LLM`` that say what runs in graphs.
        start: starts an engine, as the fixture ``engine`` does.
        model: a tiny model of as many layers.
        directory: for a draft model.

    Returns:
        The largest error, in units of the dense model's noise.
    """
    arguments: dict[str, Any] = {"max_num_batched_tokens": 64, **mode, **case.arguments}
    if case.drafts:
        resolve_here("Eagle3Qwen3ForCausalLM")
        arguments["speculative_config"] = eagle3_config(directory, **FULL)
    llm = start(model, additional_config={"swa": {**OPTIONS, **case.options}}, **arguments)
    layers = attention_layers(llm)
    assert {a.attn_backend for a in layers if a.sliding_window} == {SWATritonBackend}
    sight = Sight(
        tuple(layer.sliding_window for layer in layers),
        case.options.get("sink_tokens", 0),
        case.options.get("position_shift", False),
        phase=case.options.get("phase", "both"),
    )
    oracle, prompts = DenseQwen3(model, sight), random_prompts(case.lengths)
    num_free = num_free_pages(llm)
    with contextlib.ExitStack() as stack:
        if case.drafts:
            num_known = case.num_tokens + NUM_DRAFTED
            texts = [prompt + oracle.greedy(prompt, num_known) for prompt in prompts]
            stack.enter_context(_drafting(llm, texts, case.drafts))
        preempted = stack.enter_context(counting_preemptions(llm))
        answers = generate(llm, prompts, case.num_tokens)
    assert bool(preempted) is case.is_preempted
    assert num_free_pages(llm) == num_free
    if "kv_cache_dtype" not in case.arguments:
        return check_exact(prompts, answers, oracle)
    # Prefill reads its own keys, which no cache has rounded.
    return max(
        check_exact([p], [a], DenseQwen3(model, replace(sight, cached_from=len(p))))
        for p, a in zip(prompts, answers, strict=True)
    )


@contextlib.contextmanager
def _drafting(llm: LLM, texts: Sequence[list[int]], num_right: Sequence[int]) -> Iterator[None]:
    """Let the draft model of Model Runner V2 run, and put other tokens in the place of its own.

    Args:
        llm: is asked for all ``texts`` at once.
        texts: each prompt with the answer and a few tokens behind it.
        num_right: how many of the tokens are right, step after step.
    """
    speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
    propose, first_id = speculator.propose, llm.request_counter.counter
    turns, accepted = cycle(num_right), set[int]()

    def chosen(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        drafted: torch.Tensor = propose(batch, *args, **kwargs)
        num_sampled, num_rejected = args[4].tolist(), args[5].tolist()
        seq_lens, turn = batch.seq_lens.tolist(), next(turns)
        for row, request in enumerate(batch.req_ids):
            if num_sampled[row] + num_rejected[row] == 1 + NUM_DRAFTED:  # not in prefill
                accepted.add(num_sampled[row] - 1)
            text = texts[int(request.partition("-")[0]) - first_id]
            newest = seq_lens[row] - num_rejected[row]
            tokens = text[newest + 1 : newest + 1 + NUM_DRAFTED]
            for place, token in enumerate(tokens):
                drafted[row, place] = token if place < turn else (token + 1) % VOCAB_SIZE
        return drafted

    speculator.propose = chosen
    try:
        yield
    finally:
        del speculator.propose
    assert accepted == set(num_right)
