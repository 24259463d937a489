"""Data parallelism with each other feature: both engines have the tokens of one.

Each engine is a process, and so are its workers. Over Ray: ``test_ray.py``; their metrics:
``test_serve.py``.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.eagle3 import save_eagle3
from tests.helpers.engines import ENGINE_ARGUMENTS, Answer, ModelFactory, greedy, to_answer
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.metrics import total
from tests.helpers.stages import make_stage_buffers, stages_allowed
from tests.helpers.tiny_models import (
    FULL,
    NUM_LAYERS,
    SLIDING,
    WINDOW,
    random_prompts,
)
from tests.helpers.transfer import (
    FOR_ANOTHER,
    num_prompt_bytes,
    transfer_config,
    transfer_environment,
)

pytestmark = [pytest.mark.alone, pytest.mark.full]

NUM_ENGINES = 2
NUM_TOKENS = 24
NUM_FULL = 2  # the first layers; the others are one KV group
DRAFTS = {"num_speculative_tokens": 3}
SHIFTED = {"sink_tokens": 4, "position_shift": True}
# Options of windows, and arguments of the engines.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor parallelism and shifted sinks": (SHIFTED, {"tensor_parallel_size": 2}),
    "pipeline stages": ({}, {"pipeline_parallel_size": 2}),
    "sinks and survivors": ({"sink_tokens": 4, "prefill_pages": "survivors"}, {}),
    "a window in the prompt only": ({"phase": "prefill"}, {}),
    "a window in the answer only": ({"phase": "decode"}, {}),
    "n-grams": ({}, {"speculative_config": {"method": "ngram", "prompt_lookup_max": 3, **DRAFTS}}),
    "EAGLE-3": ({}, {"speculative_config": {"method": "eagle3", **DRAFTS}}),
}


class Engines:
    """Engines that share requests; a request may name the one it wants."""

    def __init__(self, engine: AsyncLLM) -> None:
        """Take what speaks to all of them."""
        self._engine = engine
        self._num_asked = 0

    async def answer(
        self,
        prompts: list[list[int]],
        rank: int,
        num_tokens: int = NUM_TOKENS,
        transfers: list[dict[str, Any] | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers of the engine ``rank``; ``transfers`` says where pages of each are or go."""

        async def one(index: int) -> RequestOutput:
            transfer = transfers[index] if transfers else None
            params = greedy(
                num_tokens,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"kv_transfer_params": transfer} if transfer else None,
            )
            prompt = {"prompt_token_ids": prompts[index]}
            self._num_asked += 1
            name = str(self._num_asked)
            stream = self._engine.generate(prompt, params, name, data_parallel_rank=rank)
            return [output async for output in stream][-1]

        return list(await asyncio.gather(*map(one, range(len(prompts)))))


def _run(model: Path, arguments: dict[str, Any], ask: Callable[[Engines], Any]) -> Any:
    """What ``ask`` returns of engines that live as long as it runs."""

    async def run() -> Any:
        with stages_allowed():
            engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    model=str(model),
                    max_num_batched_tokens=48,
                    data_parallel_size=NUM_ENGINES,
                    distributed_executor_backend="mp",
                    **ENGINE_ARGUMENTS,
                    **arguments,
                )
            )
        try:
            if arguments.get("pipeline_parallel_size", 1) > 1:
                await make_stage_buffers(engine.collective_rpc)
            return await ask(Engines(engine))
        finally:
            engine.shutdown()

    return asyncio.run(run())


def _answers(outputs: list[RequestOutput]) -> list[Answer]:
    return [to_answer(output.outputs[0], output.num_cached_tokens or 0) for output in outputs]


def _sight(options: dict[str, Any]) -> Sight:
    return Sight(
        tuple(None if i < NUM_FULL else WINDOW for i in range(NUM_LAYERS)),
        options.get("sink_tokens", 0),
        shift=options.get("position_shift", False),
        phase=options.get("phase", "both"),
    )


def _swa(options: dict[str, Any]) -> dict[str, Any]:
    return {"swa": {"window": WINDOW, "full_attention_layers": f"0-{NUM_FULL - 1}", **options}}


@pytest.mark.parametrize("name", CASES)
def test_both_engines_have_the_tokens_of_one(
    name: str,
    tiny_model: ModelFactory,
    no_engine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    no_engine()
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of the function for stages
    options, arguments = CASES[name]
    if name == "EAGLE-3":
        draft = str(save_eagle3(tmp_path, **SLIDING))
        speculation = {**arguments["speculative_config"], "model": draft}
        arguments = {"speculative_config": speculation}
    model, prompts = tiny_model(**FULL), random_prompts(LENGTHS)

    async def ask(engines: Engines) -> tuple[list[list[RequestOutput]], str]:
        ranks = (*range(NUM_ENGINES), 0)
        answers = [await engines.answer(prompts, rank) for rank in ranks]
        return answers, generate_latest().decode()

    asked = {**arguments, "additional_config": _swa(options)}
    outputs, metrics = _run(model, asked, ask)
    answers = [_answers(of_one) for of_one in outputs]
    check_exact(prompts, answers[0], DenseQwen3(model, _sight(options)))
    assert [[a.tokens for a in of_one] for of_one in answers] == 3 * [
        [a.tokens for a in answers[0]]
    ]
    assert [answer[-1].num_cached_tokens > 0 for answer in answers] == [False, False, True]
    for rank in range(NUM_ENGINES):
        # A window in the prompt only frees no page, and nothing is counted.
        freed = total(metrics, "swa_pages_freed_total", rank)
        assert (freed > 0) == (options.get("phase") != "prefill")
        assert total(metrics, "swa_requests_live", rank) == 0


def test_pages_go_from_one_engine_to_the_other_over_nixl(
    tiny_model: ModelFactory, no_engine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first computes prompts and the second answers, each with a side channel of its own."""
    no_engine()
    for name, value in transfer_environment().items():
        monkeypatch.setenv(name, value)
    model, prompts = tiny_model(**FULL), random_prompts(LENGTHS)

    async def ask(engines: Engines) -> tuple[list[RequestOutput], str]:
        filled = await engines.answer(prompts, 0, 1, [FOR_ANOTHER] * len(prompts))
        transfers = [output.kv_transfer_params for output in filled]
        assert all(transfers)
        answered = await engines.answer(prompts, 1, NUM_TOKENS, transfers)
        return answered, generate_latest().decode()

    asked = {"additional_config": _swa({}), "kv_transfer_config": transfer_config("kv_both")}
    outputs, metrics = _run(model, asked, ask)
    check_exact(prompts, _answers(outputs), DenseQwen3(model, _sight({})))
    moved = sum(num_prompt_bytes(length, set(range(NUM_FULL))) for length in LENGTHS)
    read = [total(metrics, "vllm:nixl_bytes_transferred_sum", rank) for rank in range(NUM_ENGINES)]
    assert read == [0, moved]
