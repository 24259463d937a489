"""What vLLM's CPU build itself refuses, gets wrong or dies of, so that the pages may say so."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import RequestOutput, SamplingParams
from vllm.lora.ops.torch_ops import bgmv_shrink
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from tests.helpers.eagle3 import eagle3_config
from tests.helpers.engines import EngineFactory, ModelFactory, generate, resolve_here
from tests.helpers.tiny_models import FULL, MIXED, random_prompts, save_lora


@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_sleep_mode(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine(tiny_model(**MIXED), enable_sleep_mode=True)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_sleep_without_its_flag(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    """It is accepted, and only pauses: a request waits, and is served behind it as before."""
    llm = engine(tiny_model(**MIXED))
    (prompt,) = random_prompts([70])
    (expected,) = generate(llm, [prompt], 8)
    llm.sleep(level=1)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("waits", {"prompt_token_ids": prompt}, greedy)
    assert not any(llm.llm_engine.step() for _ in range(5))
    llm.wake_up()
    outputs: list[RequestOutput] = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert tuple(outputs[-1].outputs[0].token_ids) == tuple(expected.tokens)
    assert not outputs[-1].num_cached_tokens  # the prefix cache was emptied


@pytest.mark.only_on("0.32/V1", "0.33/V1")  # V2 draws by a kernel of its own
@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_seed_of_a_prompt_in_chunks(
    engine: EngineFactory, tiny_model: ModelFactory, no_engine: Callable[[], None]
) -> None:
    """No window has a part in it: the model is full."""
    prompt = {"prompt_token_ids": random_prompts([20])[0]}
    seeded = SamplingParams(temperature=1.0, seed=1, max_tokens=1, detokenize=False)
    try:
        with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
            engine(tiny_model(**FULL), max_num_batched_tokens=16).generate(prompt, seeded)
    finally:
        no_engine()  # it did not survive


@pytest.mark.only_on("0.32/V1", "0.33/V1")  # with V2, kernels run in the interpreter
@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_batch_invariance() -> None:
    """A worker replaces torch's operators by Triton kernels, which the build cannot run."""
    code = """
import torch
from vllm.model_executor.determinism.batch_invariant import init_batch_invariance
init_batch_invariance()
torch.ones(2, 2).mean(dim=-1)
"""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "VLLM_BATCH_INVARIANT": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("TypeError: 'function' object is not subscriptable\n")


@pytest.mark.only_on("0.32/V1")  # 0.33's operator gives such a request zeros
def test_a_request_without_adapter_gets_the_one_of_its_batch() -> None:
    """vLLM marks it by -1, which to its CPU operators is the last adapter."""
    inputs, weights = torch.ones(2, 4), torch.ones(1, 3, 4)
    output = torch.zeros(2, 3)
    bgmv_shrink(inputs, weights, output, torch.tensor([0, -1]))
    assert output.tolist() == [[4.0] * 3] * 2


@pytest.mark.only_on("0.33/V2")
def test_an_adapter_and_drafts_with_the_newer_runner(
    engine: EngineFactory,
    tiny_model: ModelFactory,
    no_engine: Callable[[], None],
    tmp_path: Path,
) -> None:
    """No window has a part in it: an adapter's logits are computed for one token of a request."""
    model = tiny_model(**FULL)
    save_lora(tmp_path / "adapter", model, tmp_path / "merged")
    resolve_here("Eagle3Qwen3ForCausalLM")
    try:
        llm = engine(model, enable_lora=True, speculative_config=eagle3_config(tmp_path, **FULL))
        lora = LoRARequest("a", 1, str(tmp_path / "adapter"))
        with pytest.raises(RuntimeError, match="does not broadcast"):
            generate(llm, random_prompts([20, 30]), lora=lora)
    finally:
        del llm
        no_engine()  # it did not survive
