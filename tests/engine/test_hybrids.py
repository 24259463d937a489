"""Qwen3-Next and Qwen3.5: windows of the layers that attend, beside layers that have a state.

Both lie in pages of one pool, so a page may hold what a layer of the other kind left there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.helpers.dense_qwen3 import Sight
from tests.helpers.derived_models import TEXT_ONLY
from tests.helpers.engines import (
    NGRAMS,
    Answer,
    EngineFactory,
    counting_preemptions,
    generate,
    managers,
    num_free_pages,
    resolve_here,
)
from tests.helpers.exactness import check_exact
from tests.helpers.hybrid_models import KINDS, PAGE_SIZE, HybridOracle, save_tiny_hybrid
from tests.helpers.processes import Probe, probe_environment
from tests.helpers.tiny_models import WINDOW, random_prompts
from tests.helpers.wheel_sources import torchvision_files

NEXT = "Qwen3NextForCausalLM"
LENGTHS = (1, WINDOW + 1, 5 * PAGE_SIZE - 5)
ALL_SLIDE = (None, WINDOW, None, WINDOW)
LAST_SLIDES = (None, None, None, WINDOW)
# Options, and the windows of the four layers, of which every second attends.
CASES: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "all slide": ({"window": WINDOW}, ALL_SLIDE),
    "beside a full layer, sinks": (
        {"window": WINDOW, "full_attention_layers": "1", "sink_tokens": 4},
        LAST_SLIDES,
    ),
    "survivors, sinks": (
        {"window": WINDOW, "prefill_pages": "survivors", "sink_tokens": 4},
        ALL_SLIDE,
    ),
    "two windows": (
        {"window": {"1": WINDOW, "3": 2 * WINDOW}},
        (None, WINDOW, None, 2 * WINDOW),
    ),
    "in the prompt only": ({"window": {"3": WINDOW}, "phase": "prefill"}, LAST_SLIDES),
    "in the answer only": ({"window": WINDOW, "phase": "decode"}, ALL_SLIDE),
    "every page of a chunk": ({"window": WINDOW, "prefill_pages": "all"}, ALL_SLIDE),
}
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 64,
}


def _sight(options: dict[str, Any], windows: tuple[int | None, ...]) -> Sight:
    return Sight(windows, options.get("sink_tokens", 0), phase=options.get("phase", "both"))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny Qwen3-Next."""
    return save_tiny_hybrid(tmp_path_factory.mktemp("hybrid"), NEXT)


@pytest.mark.parametrize("name", CASES)
def test_windows_are_exact_on_pages_that_held_a_state(
    name: str, hybrid: Path, engine: EngineFactory
) -> None:
    options, windows = CASES[name]
    prompts = random_prompts(LENGTHS)
    llm = engine(hybrid, **ENGINE, additional_config={"swa": options})
    num_free = num_free_pages(llm)
    oracle = HybridOracle(hybrid, NEXT, _sight(options, windows))
    check_exact(prompts, generate(llm, prompts), oracle)
    again = generate(llm, prompts)
    check_exact(prompts, again, oracle)
    assert again[-1].num_cached_tokens > 0
    assert num_free_pages(llm) == num_free
    assert all(manager.snapshot().freed_by_window > 0 for manager in managers(llm))


def test_the_measure_of_noise_tells_a_window_from_none(hybrid: Path, engine: EngineFactory) -> None:
    prompts = random_prompts(LENGTHS)
    answers = generate(
        engine(hybrid, **ENGINE, additional_config={"swa": CASES["all slide"][0]}), prompts
    )
    for windows in ((None,) * 4, (None, WINDOW - 1, None, WINDOW - 1)):
        with pytest.raises(AssertionError, match="not the oracle's"):
            check_exact(prompts, answers, HybridOracle(hybrid, NEXT, Sight(windows)))


def test_preempted_requests_start_over_exactly(hybrid: Path, engine: EngineFactory) -> None:
    prompts = random_prompts([2 * PAGE_SIZE - 6] * 6)
    options = {"swa": {"window": WINDOW, "sink_tokens": 4}}
    pool = {**ENGINE, "num_gpu_blocks_override": 18, "max_model_len": 256}
    llm = engine(hybrid, **pool, additional_config=options)
    with counting_preemptions(llm) as preempted:
        answers = generate(llm, prompts, 40)
    assert preempted
    check_exact(prompts, answers, HybridOracle(hybrid, NEXT, Sight(ALL_SLIDE, 4)))


@pytest.mark.full
@pytest.mark.parametrize("name", ["all slide", "beside a full layer, sinks", "in the answer only"])
def test_two_workers_are_exact(name: str, engine: EngineFactory, tmp_path: Path) -> None:
    model = save_tiny_hybrid(tmp_path, NEXT, num_linear_heads=2)
    options, windows = CASES[name]
    config = {"swa": {"debug_poison": False, **options}}
    prompts = random_prompts(LENGTHS)
    llm = engine(model, **ENGINE, tensor_parallel_size=2, additional_config=config)
    answers = generate(llm, prompts)
    check_exact(prompts, answers, HybridOracle(model, NEXT, _sight(options, windows)))


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """Serves in a process that has torchvision's Python files, which these models import."""
    log = tmp_path_factory.mktemp("qwen3_5") / "log"
    probe = Probe("derived", probe_environment(str(torchvision_files())), log)
    yield probe
    probe.stop()


@pytest.mark.parametrize(
    "name", ["beside a full layer, sinks", "in the prompt only", "in the answer only"]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != NEXT])
def test_qwen3_5_is_served_as_qwen3_next_is(
    kind: str, name: str, qwen3_5: Probe, tmp_path: Path
) -> None:
    text_kind = "Qwen3_5MoeForCausalLM" if "Moe" in kind else "Qwen3_5ForCausalLM"
    text = save_tiny_hybrid(tmp_path / "text", text_kind)
    model = text if "Causal" in kind else save_tiny_hybrid(tmp_path / "whole", kind)
    arguments: dict[str, Any] = {} if "Causal" in kind else {"limit_mm_per_prompt": TEXT_ONLY}
    options, windows = CASES[name]
    config = {"swa": options}
    said = qwen3_5.ask(str(model), {**ENGINE, **arguments, "additional_config": config})
    assert "error" not in said, said
    assert said["windows"] == [windows[1], windows[3]]
    answers = [Answer(*answer, num_cached_tokens=0) for answer in said["answers"]]
    oracle = HybridOracle(text, text_kind, _sight(options, windows))
    check_exact(random_prompts((1, WINDOW + 1, 4 * WINDOW)), answers, oracle)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"position_shift": True, "sink_tokens": 4}, {}, "swa.position_shift was not tested"),
        ({}, {"speculative_config": NGRAMS}, "speculative decoding by ngram was not tested"),
        ({"full_attention_layers": "0"}, {}, "layer 0, which has linear attention"),
        ({"full_attention_layers": "1,3"}, {}, "names all 2 layers that attend"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_was_not_tried_beside_states_is_refused(
    hybrid: Path, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    resolve_here(NEXT)
    with pytest.raises(ValueError, match=message):
        LLM(
            str(hybrid),
            skip_tokenizer_init=True,
            additional_config={"swa": {"window": WINDOW, **options}},
            **arguments,
        )
