"""A Qwen3 without windows is served as if the plugin were not installed, whatever its config."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import (
    Answer,
    EngineFactory,
    ModelFactory,
    describe,
    described_prompts,
    resolve_here,
)
from tests.helpers.exactness import check_exact
from tests.helpers.probes.accepts import refusal
from tests.helpers.processes import ask_without_plugin
from tests.helpers.tiny_models import (
    BY_LAYER_TYPES,
    FULL,
    MIXED,
    MOE,
    NUM_LAYERS,
    ROPE,
    WINDOW,
    tiny_config,
)

pytestmark = pytest.mark.long

NUM_CASES, NUM_SERVED = 120, 5
ABSENT = object()
LAYERS = {n: ["full_attention"] * n for n in (1, 2, 4, 6)}
KEYS: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False, ABSENT),
    "sliding_window": (None, ABSENT, 8, 4096),
    "max_window_layers": (ABSENT, 0, 2, 4, 70),
    "layer_types": (ABSENT, LAYERS[4], None),
}
OVERRIDES: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1, 2, 6),
    "layer_types": tuple(LAYERS.values()),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "max_window_layers": (0, 1, 9),
    "max_position_embeddings": (768, 1024),
    "rope_parameters": (ROPE["yarn"],),
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "max_model_len": (320, 400),
    "enable_prefix_caching": (False,),
    "disable_sliding_window": (True,),
    "disable_hybrid_kv_cache_manager": (True,),
}
Case = tuple[dict[str, Any], dict[str, Any]]


def make_case(generator: random.Random) -> Case:
    """Keys of config.json that give no window, and arguments of an engine."""
    keys = {key: generator.choice(values) for key, values in KEYS.items()}
    config = {k: v for k, v in keys.items() if v is not ABSENT}
    if generator.random() < 0.3:
        config.update(MOE)
    overrides = _some(generator, OVERRIDES)
    arguments = _some(generator, ARGUMENTS)
    return config, {**arguments, **({"hf_overrides": overrides} if overrides else {})}


def _some(generator: random.Random, choices: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    names = generator.sample(sorted(choices), generator.choice((0, 1, 1, 2)))
    return {name: generator.choice(choices[name]) for name in names}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, Any]]]:
    """Directories with a config.json, and arguments of an engine."""
    resolve_here("Qwen3ForCausalLM")
    resolve_here("Qwen3MoeForCausalLM")
    generator = random.Random(int(os.environ.get("SWA_TEST_SEED", "0")))
    base = tiny_config(**FULL).to_dict()
    base["architectures"] = ["Qwen3ForCausalLM"]
    made = []
    for index in range(NUM_CASES):
        keys, arguments = make_case(generator)
        directory = tmp_path_factory.mktemp(f"case{index}")
        config = {k: v for k, v in base.items() if k not in KEYS} | keys
        (directory / "config.json").write_text(json.dumps(config))
        made.append((str(directory), {"dtype": "float32", **arguments}))
    return made


@pytest.fixture(scope="module")
def stock_accepts(cases: list[Any]) -> list[Any]:
    """Those that stock vLLM takes."""
    refusals = ask_without_plugin("accepts", json.dumps(cases))
    return [case for case, said in zip(cases, refusals, strict=True) if said is None]


def test_what_stock_takes_is_taken(stock_accepts: list[Any], record_property: Any) -> None:
    record_property("summary: configs without windows", len(stock_accepts))
    assert len(stock_accepts) > 0.8 * NUM_CASES
    refused = {}
    for model, arguments in stock_accepts:
        if said := refusal(model, arguments):
            refused[Path(model, "config.json").read_text() + str(arguments)] = said
    assert not refused


def test_what_stock_takes_is_served_alike(
    stock_accepts: list[Any], describe_stock: Callable[..., Any], engine: EngineFactory
) -> None:
    """The same classes and the same tokens, from the same random weights."""
    dense = [
        case
        for case in stock_accepts
        if "qwen3_moe" not in Path(case[0], "config.json").read_text()
    ]
    for model, arguments in dense[:NUM_SERVED]:
        stock = describe_stock(model, **arguments, load_format="dummy")
        served = json.loads(json.dumps(describe(engine(model, **arguments, load_format="dummy"))))
        outermost, *modules = stock["modules"]
        assert served == {**stock, "modules": [f"SWA{outermost}", *modules]}, arguments


def test_stock_serves_a_mix_by_its_transformers_backend_alone(
    describe_stock: Callable[..., Any], tiny_model: ModelFactory
) -> None:
    """As our pages and ``swa plan`` say: vLLM's own Qwen3 refuses it, or has no window."""
    mixed, listed = tiny_model(**MIXED), tiny_model(**BY_LAYER_TYPES)
    assert "for some but all layers is not supported" in describe_stock(mixed)["error"]
    assert describe_stock(listed)["specs"] == ["FullAttentionSpec"]
    served = describe_stock(mixed, model_impl="transformers")
    assert sorted(set(served["specs"])) == ["FullAttentionSpec", "SlidingWindowSpec"]
    windows = (None, None, *(WINDOW,) * (NUM_LAYERS - 2))
    answers = [Answer(*answer, num_cached_tokens=0) for answer in served["answers"]]
    check_exact(described_prompts(), answers, DenseQwen3(mixed, Sight(windows)))
