"""Groups of layers, and the KV cache of each worker, at start-up."""

from dataclasses import replace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.engines import ModelFactory
from tests.helpers.start_up import Specs, plan_kv_caches
from tests.helpers.tiny_models import FULL
from tests.plugin.upstream.pages import POLICIES, full_spec, stock_spec, windowed_spec

PAGE, NUM_PAGES = 16, 32
SPECS = {
    "stock": stock_spec(40, PAGE),
    **{policy.value: windowed_spec(40, PAGE, policy) for policy in POLICIES},
    "sinks": windowed_spec(40, PAGE, sink_tokens=4, spare_tokens=4),
}


@pytest.fixture
def config(tiny_model: ModelFactory) -> VllmConfig:
    """An engine's config, of short texts."""
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(str(tiny_model(**FULL)), **arguments).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def _layers(num_full: int, sliding: list[Any]) -> Specs:
    specs = [*[full_spec(PAGE)] * num_full, *sliding]
    return {str(layer): spec for layer, spec in enumerate(specs)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("num_full", "num_sliding", "groups"),
    [
        (0, 2, ["01"]),
        (1, 1, ["0", "1"]),
        (1, 2, ["0", "1", "2"]),
        (2, 4, ["01", "24", "35"]),
        (3, 7, ["012", "369", "47", "58"]),
        (5, 4, ["01234", "5678"]),
    ],
)
def test_layers_are_grouped_as_vllms(
    num_full: int, num_sliding: int, groups: list[str], name: str, config: VllmConfig
) -> None:
    specs = _layers(num_full, [SPECS[name]] * num_sliding)
    group_bytes = len(groups[0]) * specs["0"].page_size_bytes
    (planned,) = plan_kv_caches(config, [specs], [NUM_PAGES * group_bytes])
    assert ["".join(group.layer_names) for group in planned.kv_cache_groups] == groups
    assert [group.kv_cache_spec for group in planned.kv_cache_groups] == [
        specs[group[0]] for group in groups
    ]
    assert planned.num_blocks == NUM_PAGES


def test_workers_have_as_many_pages_as_the_one_with_the_least_memory(config: VllmConfig) -> None:
    specs = _layers(1, [SPECS["sinks"]])
    size = specs["0"].page_size_bytes
    planned = plan_kv_caches(config, [specs] * 2, [NUM_PAGES * size, 2 * NUM_PAGES * size])
    assert planned[0] == planned[1]
    assert planned[0].num_blocks == NUM_PAGES


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": 41},
        {"storage": StoragePolicy(sink_tokens=5, spare_tokens=4)},
        {"rollback_tokens": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_workers_whose_layers_differ_do_not_start(
    changed: dict[str, Any], config: VllmConfig
) -> None:
    spec = SPECS["sinks"]
    assert isinstance(spec, SWASpec)
    workers = [_layers(1, [spec]), _layers(1, [replace(spec, **changed)])]
    with pytest.raises((AssertionError, ValueError), match="different"):
        plan_kv_caches(config, workers, [2**20] * 2)
