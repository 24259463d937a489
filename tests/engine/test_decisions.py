"""What was decided about windows belongs to one engine, and is made once where it is used."""

from collections.abc import Callable

import pytest
from vllm.config import VllmConfig

from swa_vllm.config.swa_config import SWAConfig
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    managers,
    start_engine,
    stop_engine,
)
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.tiny_models import FULL, random_prompts


def test_two_engines_in_one_process_keep_their_own_options(
    tiny_model: ModelFactory, no_engine: Callable[[], None]
) -> None:
    no_engine()
    model, prompts = tiny_model(**FULL), random_prompts(LENGTHS)
    with_sinks = start_engine(
        model,
        additional_config={"swa": {"window": 40, "sink_tokens": 4}},
        max_num_batched_tokens=64,
    )
    mixed = start_engine(
        model,
        additional_config={
            "swa": {"window": 24, "full_attention_layers": "0-1", "prefill_pages": "all"}
        },
    )
    seen = {
        with_sinks: Sight((40,) * 4, 4),
        mixed: Sight((None, None, 24, 24)),
    }
    for llm in (with_sinks, mixed, with_sinks):
        check_exact(prompts, generate(llm, prompts), DenseQwen3(model, seen[llm]))
    assert [m.kv_cache_spec.storage.prefill_pages.value for m in managers(with_sinks)] == ["auto"]
    assert [m.kv_cache_spec.storage.prefill_pages.value for m in managers(mixed)] == ["all"]
    del llm, with_sinks, mixed, seen
    stop_engine()


def test_layers_share_the_decisions_of_their_model(
    tiny_model: ModelFactory, engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made twice here: by the config hook, which refuses, and by the model, which serves."""
    made = []
    decide = SWAConfig.from_vllm.__func__  # type: ignore[attr-defined]

    def counted(cls: type[SWAConfig], vllm_config: VllmConfig) -> SWAConfig:
        made.append(decide(cls, vllm_config))
        return made[-1]

    monkeypatch.setattr(SWAConfig, "from_vllm", classmethod(counted))
    llm = engine(tiny_model(**FULL), additional_config={"swa": {"window": 17}}, max_num_seqs=3)
    generate(llm, random_prompts([40]))
    hook, model = made
    assert hook == model
    assert all(layer.swa is model for layer in attention_layers(llm))
