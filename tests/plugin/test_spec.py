"""What a windowed layer's spec takes from vLLM's config, and from vLLM's own spec."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.eagle3 import eagle3_config
from tests.helpers.engines import ModelFactory, resolve_here
from tests.helpers.tiny_models import FULL, SLIDING
from tests.plugin.upstream.pages import stock_spec

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("drafts", "rejected_a_step", "lookahead", "drops_last_hit"),
    [("none", 0, 0, False), ("ngram", 4, 0, False), ("eagle3", 3, 3, True)],
)
def test_rollback_is_that_of_all_steps_in_flight(
    drafts: str,
    rejected_a_step: int,
    lookahead: int,
    drops_last_hit: bool,
    is_async: bool,
    tiny_model: ModelFactory,
    tmp_path: Path,
) -> None:
    """vLLM's CPU platform turns asynchronous scheduling off; here it is on behind its back."""
    resolve_here("Eagle3Qwen3ForCausalLM")
    speculation: dict[str, Any] = {
        "none": {},
        "ngram": {"speculative_config": NGRAM},
        "eagle3": {"speculative_config": eagle3_config(tmp_path, **FULL)},
    }[drafts]
    config = EngineArgs(
        str(tiny_model(**SLIDING)), skip_tokenizer_init=True, dtype="float32", **speculation
    ).create_engine_config()
    config.scheduler_config.async_scheduling = is_async
    spec = SWASpec.from_stock(stock_spec(40, 16), config, StoragePolicy())
    num_steps = 2 if is_async else 1
    assert spec.num_steps_in_flight == num_steps
    # Without drafts, the token that a session drops when its turn ends with a step in flight.
    rollback = num_steps - 1 if drafts == "none" else num_steps * rejected_a_step
    assert spec.frees_by_schedule is (drafts == "none")
    assert spec.rollback_tokens == spec.pages.rollback_tokens == rollback
    assert spec.lookahead_tokens == spec.num_ahead_tokens == lookahead
    assert spec.drops_last_hit is drops_last_hit
    spare = SWASpec.from_stock(stock_spec(40, 16), config, StoragePolicy(spare_tokens=9))
    assert spec.max_num_blocks_per_req(config, 160) == 10
    assert spare.max_num_blocks_per_req(config, 160) == 11


def test_spec_keeps_what_vllms_own_says(tiny_model: ModelFactory) -> None:
    config = EngineArgs(str(tiny_model(**SLIDING)), skip_tokenizer_init=True).create_engine_config()
    changed = {
        "dcp_sharded": False,
        "extra_retained_tokens": 3,
        "is_draft": True,
        "max_tp_shards": 2,
        "num_head_slots": 4,
        "page_size_padded": 4096,
    }
    stock = stock_spec(40, 16)
    names = {field.name for field in fields(stock)}
    assert changed.keys() - names <= {"is_draft"}  # not in 0.32
    stock = replace(stock, **{name: changed[name] for name in changed.keys() & names})
    spec = SWASpec.from_stock(stock, config, StoragePolicy())
    assert {name: getattr(spec, name) for name in names} == {
        name: getattr(stock, name) for name in names
    }
    assert spec.page_size_bytes == stock.page_size_bytes == 4096
