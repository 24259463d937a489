"""`swa eval layers`: the layers that cost least slide, and no more than the budget asks for."""

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from swa_backend.pages import ceil_div
from swa_vllm.tools.cli import main
from swa_vllm.tools.engines.perplexity import Measured
from swa_vllm.tools.eval.layer_search import Layers, Trials, find_sliding_layers, trials_in_order
from tests.helpers.trained_models import SLIDING, TEXT

NUM_LAYERS = 8
COSTS = (0.08, 0.01, 0.03, 0.02, 0.05, 0.04, 0.07, 0.06)


def measure(sliding: Layers) -> Measured:
    """Costs add up; a full layer takes 10 bytes, a sliding one 2, groups of three waste 7."""
    growth = sum(COSTS[layer] for layer in sliding)
    wasted = 7 if 0 < len(sliding) < NUM_LAYERS and len(sliding) % 3 == 0 else 0
    pool_bytes = 10 * (NUM_LAYERS - len(sliding)) + 2 * len(sliding) + wasted
    return Measured(10 * (1 + growth), pool_bytes, pool_bytes, pool_bytes, 1)


def test_the_cheapest_layers_slide_and_no_more_than_needed() -> None:
    trials = Trials(measure)
    search = find_sliding_layers(trials, NUM_LAYERS, budget=0.6, rounds=1)
    assert search.plan == {1, 3, 2, 5}
    assert search.costs == pytest.approx(dict(enumerate(COSTS)))
    assert search.order == (1, 3, 2, 5, 4, 7, 6, 0)
    assert set(trials_in_order(trials, search)) == {
        Layers(search.order[:count]) for count in (0, 1, 4, NUM_LAYERS)
    }


def test_padding_is_paid_by_one_more_layer() -> None:
    """Three would do by their own bytes."""
    search = find_sliding_layers(Trials(measure), NUM_LAYERS, budget=0.7, rounds=1)
    assert search.plan == {1, 3, 2, 5}


def test_later_rounds_see_how_layers_add_up() -> None:
    """Layers 1 and 3 are each cheap, and dear together."""

    def entangled(sliding: Layers) -> Measured:
        plain = measure(sliding)
        together = 5.0 if {1, 3} <= sliding else 0.0
        return Measured(plain.perplexity + together, *list(vars(plain).values())[1:])

    assert find_sliding_layers(Trials(entangled), NUM_LAYERS, 0.6, rounds=1).plan == {1, 3, 2, 5}
    assert find_sliding_layers(Trials(entangled), NUM_LAYERS, 0.6, rounds=4).plan == {1, 2, 5, 4}


def test_nothing_is_measured_twice() -> None:
    asked = list[Layers]()

    def count(sliding: Layers) -> Measured:
        asked.append(sliding)
        return measure(sliding)

    find_sliding_layers(Trials(count), NUM_LAYERS, 0.6, rounds=2)
    assert len(asked) == len(set(asked))


def test_a_budget_below_all_sliding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 0\.200 of full attention's bytes, more than"):
        find_sliding_layers(Trials(measure), NUM_LAYERS, budget=0.1, rounds=1)


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, no_engine: Callable[[], None]
) -> dict[str, Any]:
    """What the command finds for the first two layers of a trained model."""
    no_engine()
    model = tmp_path_factory.mktemp("layers") / "model"
    shutil.copytree(SLIDING, model)
    config = json.loads((SLIDING / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(SLIDING / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not re.search(r"layers\.[23]\.", name)}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    path = model / "layers.json"
    command = ["eval", "layers", str(model), "--text", str(TEXT), "--json", str(path), "--quick"]
    sizes = ["--length", "256", "--window", "32", "--sink-tokens", "0", "--budget", "0.8"]
    assert main([*command, *sizes, "--dtype", "float32", "--block-size", "32"]) == 0
    return dict(json.loads(path.read_text()))


def test_command_keeps_to_the_budget_of_real_bytes(found: dict[str, Any]) -> None:
    page_bytes = 32 * 2 * 2 * 64 * 4  # of a layer: keys and values, two heads of 64
    full, plan, least = found["held_out"].values()
    num_full = ceil_div(256 + 2, 32)
    assert full["pool_bytes"] == 2 * num_full * page_bytes
    assert (plan["num_groups"], plan["pool_bytes"]) == (2, (num_full + 2) * page_bytes)
    assert least["pool_bytes"] == 2 * 2 * page_bytes
    assert plan["pool_bytes"] <= 0.8 * full["pool_bytes"]


def test_command_slides_the_layer_that_costs_less_alone(found: dict[str, Any]) -> None:
    dearest = max(found["costs"], key=found["costs"].get)
    expected = {"window": 32, "full_attention_layers": [int(dearest)]}
    assert found["additional_config"] == {"swa": expected}
    measured = {tuple(arm["sliding"]): arm["perplexity"] for arm in found["curve"]}
    assert set(measured) == {(), (0, 1), (1 - int(dearest),)}
