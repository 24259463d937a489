"""Pipeline stages: the tokens of one process, whatever kinds of layers a stage has.

vLLM's CPU build lacks a buffer, which :mod:`tests.helpers.stages` makes. Over Ray, on two nodes:
``test_ray.py``.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    generate,
    managers,
    num_free_pages,
)
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.stages import staged_engine
from tests.helpers.tiny_models import FULL, NUM_LAYERS, WINDOW, random_prompts

pytestmark = pytest.mark.alone

SINKS = {"sink_tokens": 4}
SURVIVORS = {"prefill_pages": "survivors"}
# Stages, workers of each, options and layers that are full. Of three stages of four layers the
# second has two.
CASES: dict[str, tuple[int, int, dict[str, Any], set[int]]] = {
    "a stage of each kind, shifted sinks": (2, 1, {**SINKS, "position_shift": True}, {0, 1}),
    "three stages, the last without a window": (3, 1, {**SINKS, **SURVIVORS}, {1, 3}),
    "a window in the prompt only": (2, 1, {"phase": "prefill"}, {2}),
    "a window in the answer only": (2, 1, {"phase": "decode"}, {2}),
    "two workers a stage": (2, 2, {}, {1}),
}


@pytest.mark.parametrize("name", CASES)
def test_stages_have_the_tokens_of_one_process(
    name: str,
    tiny_model: ModelFactory,
    engine: EngineFactory,
    no_engine: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    num_stages, num_workers, options, full = CASES[name]
    model = tiny_model(**FULL)
    layers = {"window": WINDOW, "full_attention_layers": ",".join(map(str, sorted(full)))}
    kwargs: dict[str, Any] = {
        "max_num_batched_tokens": 48,
        "additional_config": {"swa": {**layers, **options}},
    }
    prompts = random_prompts(LENGTHS)
    alone = generate(engine(model, **kwargs), prompts)
    no_engine()
    capfd.readouterr()
    sizes = {"pipeline_parallel_size": num_stages, "tensor_parallel_size": num_workers}
    with staged_engine(model, **sizes, **kwargs) as llm:
        num_free = num_free_pages(llm)
        answers, again = generate(llm, prompts), generate(llm, prompts)
        assert num_free_pages(llm) == num_free
        counts = [manager.snapshot() for manager in managers(llm)]
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    assert [a.tokens for a in again] == [a.tokens for a in alone]
    assert again[-1].num_cached_tokens > 0
    windows = tuple(None if i in full else WINDOW for i in range(NUM_LAYERS))
    sight = Sight(
        windows,
        options.get("sink_tokens", 0),
        shift=options.get("position_shift", False),
        phase=options.get("phase", "both"),
    )
    check_exact(prompts, answers, DenseQwen3(model, sight))
    assert all(c.live == 0 for c in counts)
    if sight.phase == "both":
        assert counts
        assert all(c.freed_by_window > 0 for c in counts)
    _check_table(capfd.readouterr(), full)


def _check_table(printed: Any, full: set[int]) -> None:
    """The table of layers was logged once, whole."""
    rows = re.findall(r"SWA ([\d, -]+?) +(full|sliding)", printed.out + printed.err)
    kinds = {}
    for layers, kind in rows:
        for run in layers.split(", "):
            first, _, last = run.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                assert layer not in kinds
                kinds[layer] = kind
    assert kinds == {i: "full" if i in full else "sliding" for i in range(NUM_LAYERS)}
