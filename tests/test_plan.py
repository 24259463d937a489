"""`swa plan`: what it says of engines that were then started, of configs, and of nonsense."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from vllm import LLM, SamplingParams

from conftest import EngineFactory, ModelFactory
from engine_tools import scheduler
from swa_backend.checkpoint import read_checkpoint
from swa_backend.config import SWAConfigError, SWAOptions
from swa_backend.layers import resolve_layers
from swa_vllm.tools.cli import main
from tiny_models import BY_LAYER_TYPES, FULL, MIXED, ROPE, SLIDING, random_prompts

PROMPT, OUTPUT = 300, 60


@dataclass(frozen=True)
class Started:
    """A checkpoint, and how it is served.

    Attributes:
        options: of the plugin.
        kwargs: other arguments of the engine.
    """

    checkpoint: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    arm: str = "this plugin"


STARTED = {
    "sliding": Started(SLIDING),
    "mixed, short chunks": Started(MIXED, kwargs={"max_num_batched_tokens": 48}),
    "one full layer of four": Started(FULL, {"window": 56, "full_attention_layers": "every:4"}),
    "padded: three full layers, four sliding": Started(
        {**FULL, "num_hidden_layers": 7}, {"window": 33, "full_attention_layers": "0-2"}
    ),
    "sinks": Started(SLIDING, {"sink_tokens": 4}, {"block_size": 64}),
    "mixed, sinks": Started(
        MIXED, {"sink_tokens": 70, "full_attention_layers": "0"}, {"max_num_batched_tokens": 100}
    ),
    "bfloat16, chunks longer than the text": Started(
        BY_LAYER_TYPES, kwargs={"dtype": "bfloat16", "max_num_batched_tokens": 2048}
    ),
    "full attention of a sliding checkpoint": Started(
        MIXED, {"enabled": False}, arm="full attention"
    ),
}


def _plan(model: Path, started: Started, path: Path) -> dict[str, Any]:
    """The figures, with the sizes that engines of these tests are started with."""
    sizes = {"block_size": 32, "dtype": "float32", "max_num_batched_tokens": 512, **started.kwargs}
    sizes |= {"max_model_len": 512, "max_num_seqs": 8, "kv_memory": "1GiB"}
    sizes |= {k: v for k, v in started.options.items() if k != "enabled"}
    sizes |= {"device": "cpu", "prompt": PROMPT, "output": OUTPUT, "json": path}
    flags = [x for k, v in sizes.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["plan", str(model), *flags]) == 0
    return dict(json.loads(path.read_text()))


def _walk(llm: LLM) -> list[int]:
    """Pages that one request holds after each step."""
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    (prompt,) = random_prompts([PROMPT])
    llm.llm_engine.add_request("planned", {"prompt_token_ids": prompt}, params)
    groups = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        tables = [table for group in groups for table in group.req_to_blocks.values()]
        held.append(sum(not block.is_null for table in tables for block in table))
    return held[:-1]  # the last step gives all back


@pytest.mark.parametrize("name", STARTED)
def test_a_started_engine_has_what_was_planned(
    name: str, engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    started = STARTED[name]
    model = tiny_model(**started.checkpoint)
    llm = engine(
        model,
        # Poison would be written to all of the 1 GiB that VLLM_CPU_KVCACHE_SPACE gives.
        additional_config={"swa": {"debug_poison": False, **started.options}},
        enable_prefix_caching=False,
        num_gpu_blocks_override=None,
        **{"max_num_batched_tokens": 512, **started.kwargs},
    )
    figures = _plan(model, started, tmp_path / "plan.json")
    planned, real = figures["pools"][started.arm], scheduler(llm).kv_cache_config
    assert planned["num_pages"] == real.num_blocks
    assert sum(group["num_groups"] for group in planned["groups"]) == len(real.kv_cache_groups)
    size = {len(g.layer_names) for g in real.kv_cache_groups}
    layer_bytes = {g.kv_cache_spec.page_size_bytes for g in real.kv_cache_groups}
    assert planned["page_bytes"] == max(size) * layer_bytes.pop()
    assert planned["estimate"] == llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
    held = _walk(llm)
    (request,) = figures["requests"]
    assert request["arms"][started.arm]["peak_pages"] == max(held)
    assert request["arms"][started.arm]["last_pages"] == held[-1]


CONFIGS = {
    "full": FULL,
    "mixed": MIXED,
    "by layer types": BY_LAYER_TYPES,
    "default window": {"use_sliding_window": True, "max_window_layers": 1},
    "no KV heads": {"num_key_value_heads": None},
    "yarn": {"rope_parameters": ROPE["yarn"]},
    "linear": {"rope_parameters": ROPE["linear"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_by_transformers(name: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(**CONFIGS[name])
    ours, theirs = read_checkpoint(model), AutoConfig.from_pretrained(model)
    assert ours == read_checkpoint(model / "config.json")
    shape = (ours.num_layers, ours.num_kv_heads, ours.head_dim, ours.max_positions)
    assert shape == (
        theirs.num_hidden_layers,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.max_position_embeddings,
    )
    for options in ({}, {"window": 9, "full_attention_layers": "0"}, {"sink_tokens": 4}):
        assert _resolved(ours.config, options) == _resolved(theirs, options)


def _resolved(config: Any, options: dict[str, Any]) -> Any:
    try:
        return resolve_layers(config, SWAOptions.from_dict(options), max_model_len=10_000)
    except SWAConfigError as error:
        return str(error)
