"""Models that draft for a windowed Qwen3: served with the same tokens, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.eagle3 import eagle3_config, save_draft
from tests.helpers.engines import EngineFactory, ModelFactory, generate, resolve_here, scheduler
from tests.helpers.tiny_models import FULL, MIXED, SLIDING, WINDOW, random_prompts

LENGTHS = (5, WINDOW + 1, 4 * WINDOW)


@pytest.mark.parametrize("sinks", [{}, {"sink_tokens": 33}], ids=["plain", "sinks"])
@pytest.mark.parametrize(
    "draft", [FULL, {**SLIDING, "sliding_window": 24}], ids=["full_draft", "sliding_draft"]
)
def test_eagle3_draft_changes_no_token(
    draft: dict[str, Any],
    sinks: dict[str, Any],
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
) -> None:
    prompts = random_prompts(LENGTHS)
    options = {"swa": {"window": WINDOW, "full_attention_layers": "0-1", **sinks}}
    alone = engine(tiny_model(**FULL), additional_config=options)
    plain = [a.tokens for a in generate(alone, prompts)]
    del alone
    resolve_here("Eagle3Qwen3ForCausalLM")
    llm = engine(
        tiny_model(**FULL),
        additional_config=options,
        speculative_config=eagle3_config(tmp_path, **draft),
    )
    assert [a.tokens for a in generate(llm, prompts)] == plain
    again = generate(llm, prompts)
    assert [a.tokens for a in again] == plain
    assert again[-1].num_cached_tokens > 0
    # The options are the target's; the draft follows its own config.
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    windows = [layers[f"model.layers.{i}.self_attn.attn"].sliding_window for i in range(5)]
    assert windows == [None, None, WINDOW, WINDOW, 24 if draft.get("sliding_window") else None]
    assert scheduler(llm).num_spec_tokens == 3


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        ("dflash", "DFlash2DraftModel", "by dflash was not tested .* the draft DFlash2DraftModel"),
        ("dspark", "Qwen3DSparkModel", "by dspark was not tested with windows"),
    ],
)
def test_other_drafts_are_refused_before_weights(
    method: str,
    architecture: str,
    message: str,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
) -> None:
    resolve_here(architecture)
    speculation = {
        "method": method,
        "model": str(save_draft(tmp_path, architecture)),
        "num_speculative_tokens": 3,
    }
    with pytest.raises(ValueError, match=message):
        engine(tiny_model(**MIXED), speculative_config=speculation)
