"""Draft models and DFlash beside a windowed Qwen3, whose layers follow the draft's own config."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

import swa_vllm
from swa_vllm.attention import layer_table
from swa_vllm.compat.group_numbers import number_kv_groups
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.dense_text import TextOracle
from tests.helpers.dflash import dflash_config
from tests.helpers.eagle3 import save_draft
from tests.helpers.engines import (
    Answer,
    EngineFactory,
    ModelFactory,
    check_drafts_were_verified,
    generate,
    managers,
    num_free_pages,
    resolve_here,
    scheduler,
)
from tests.helpers.exactness import check_exact
from tests.helpers.tiny_models import (
    FULL,
    MIXED,
    PAGE_SIZE,
    ROPE,
    SLIDING,
    WINDOW,
    random_prompts,
    save_tiny_moe,
)

LENGTHS = (1, WINDOW + 1, 4 * WINDOW)
SHORT = 24
# The target's weights with slightly other positions: it guesses some tokens, and others not.
NEARLY = {"rope_parameters": {**ROPE["default"], "rope_theta": 10500.0}}
SHORT_DRAFT = {**SLIDING, "sliding_window": SHORT}
HALF = {"window": WINDOW, "full_attention_layers": "0-1"}
HALF_WINDOWS = (None, None, WINDOW, WINDOW)
# Options of the target, windows of its layers, and the draft's config.
Case = tuple[dict[str, Any], tuple[int | None, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "survivors, mixed draft": ({**HALF, "prefill_pages": "survivors"}, HALF_WINDOWS, MIXED),
    "shifted sinks, shorter draft": (
        {**HALF, "sink_tokens": 33, "position_shift": True},
        HALF_WINDOWS,
        SHORT_DRAFT,
    ),
    "in prompts only, mixed draft": ({**HALF, "phase": "prefill"}, HALF_WINDOWS, MIXED),
    "in answers only, mixed draft": ({**HALF, "phase": "decode"}, HALF_WINDOWS, MIXED),
    "two windows, full draft": (
        {"window": {"0-1": SHORT, "2-3": WINDOW}},
        (SHORT, SHORT, WINDOW, WINDOW),
        FULL,
    ),
    "full target, sliding draft": ({}, (None,) * 4, SLIDING),
}


def _draft_model(model: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}


def _layer_rows(llm: LLM) -> list[tuple[int, tuple[str, ...]]]:
    """Rows of the log's table: a layer's number, and how it is described."""
    config = llm.llm_engine.vllm_config
    context = config.compilation_config.static_forward_context
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    numbers = {name: i for i, group in enumerate(groups) for name in group.layer_names}
    assert number_kv_groups(config, get_kv_cache_spec(config)) == numbers
    return layer_table._described_layers(config, dict(context), numbers)


def _check_drafted(
    model: Path,
    case: tuple[dict[str, Any], tuple[int | None, ...]],
    speculation: dict[str, Any],
    plain: Sequence[Answer],
    engine: EngineFactory,
) -> LLM:
    """Drafted answers are ``plain`` and a dense model's, twice; gives the engine."""
    options, windows = case
    prompts = random_prompts(LENGTHS)
    llm = engine(
        model,
        additional_config={"swa": options},
        speculative_config=speculation,
        max_num_batched_tokens=2 * PAGE_SIZE,
        disable_log_stats=False,
    )
    num_free = num_free_pages(llm)
    answers = generate(llm, prompts)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    phase = options.get("phase", "both")
    sight = Sight(
        windows,
        options.get("sink_tokens", 0),
        options.get("position_shift", False),
        phase=phase,
    )
    check_exact(prompts, answers, (DenseQwen3 if phase == "both" else TextOracle)(model, sight))
    again = generate(llm, prompts)
    assert [a.tokens for a in again] == [a.tokens for a in plain]
    assert again[-1].num_cached_tokens > 0
    check_drafts_were_verified(llm)
    assert num_free_pages(llm) == num_free
    return llm


def _plain_answers(
    model: Path, options: dict[str, Any], engine: EngineFactory
) -> tuple[Answer, ...]:
    llm = engine(model, additional_config={"swa": options}, max_num_batched_tokens=2 * PAGE_SIZE)
    return tuple(generate(llm, random_prompts(LENGTHS)))


@pytest.mark.only_on("0.33/V2")
@pytest.mark.parametrize("name", CASES)
def test_draft_model_changes_no_token(
    name: str, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    options, windows, draft = CASES[name]
    model, drafting = tiny_model(**FULL), tiny_model(**{**draft, **NEARLY})
    plain = _plain_answers(model, options, engine)
    llm = _check_drafted(model, (options, windows), _draft_model(drafting), plain, engine)
    first = draft.get("max_window_layers", 4)
    own = [draft["sliding_window"] if i >= first else None for i in range(4)]
    rows = [row for row in _layer_rows(llm) if row[1][0].endswith(" (draft)")]
    assert [index for index, _ in rows] == [0, 1, 2, 3]
    assert [row[1] for _, row in rows] == [str(window or "-") for window in own]
    # A sliding draft frees its own pages, which are counted by its own group.
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    drafts = [
        index
        for index, group in enumerate(groups)
        if any(layer.startswith("draft_model.") for layer in group.layer_names)
    ]
    sliding = [m for m in managers(llm) if m.kv_cache_group_id in drafts]
    assert bool(sliding) == any(own)
    counts = {group: c for (_, group), c in swa_vllm.stats(llm).items()}
    assert all(counts[m.kv_cache_group_id].freed_by_window > 0 for m in sliding)


@pytest.mark.only_on("0.33/V2")
def test_draft_with_pages_of_another_size(tiny_model: ModelFactory, engine: EngineFactory) -> None:
    options: dict[str, Any] = {"window": WINDOW}
    model, drafting = tiny_model(**FULL), tiny_model(**{**SHORT_DRAFT, "num_key_value_heads": 1})
    plain = _plain_answers(model, options, engine)
    prompts = random_prompts(LENGTHS)
    llm = engine(
        model, additional_config={"swa": options}, speculative_config=_draft_model(drafting)
    )
    answers = generate(llm, prompts)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    sizes = {m.kv_cache_spec.sliding_window: m.block_size for m in managers(llm)}
    assert sizes == {WINDOW: PAGE_SIZE, SHORT: 2 * PAGE_SIZE}
    assert all(m.snapshot().freed_by_window > 0 for m in managers(llm))


@pytest.mark.everywhere
def test_draft_model_with_the_targets_window(
    tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    """One KV group, all that Model Runner V1 serves a draft model from."""
    options: dict[str, Any] = {"window": WINDOW, "prefill_pages": "survivors"}
    model = tiny_model(**FULL)
    plain = _plain_answers(model, options, engine)
    speculation = _draft_model(tiny_model(**SLIDING, **NEARLY))
    llm = _check_drafted(model, (options, (WINDOW,) * 4), speculation, plain, engine)
    (manager,) = managers(llm)
    assert manager.kv_cache_spec.lookahead_tokens == 3
    assert manager.snapshot().freed_by_window > 0


@pytest.mark.only_on("0.32/V1", "0.33/V1")
def test_draft_model_beside_a_mixture_of_experts(
    tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    model = save_tiny_moe(tmp_path, **SLIDING)
    plain = _plain_answers(model, {}, engine)
    drafting = _draft_model(tiny_model(**SLIDING))
    llm = engine(model, speculative_config=drafting, max_num_batched_tokens=2 * PAGE_SIZE)
    answers = generate(llm, random_prompts(LENGTHS))
    assert [a.tokens for a in answers] == [a.tokens for a in plain]


def _check_dflash(
    options: dict[str, Any],
    draft: dict[str, Any],
    tiny_model: ModelFactory,
    engine: EngineFactory,
    directory: Path,
) -> LLM:
    model = tiny_model(**FULL)
    plain = _plain_answers(model, options, engine)
    ((most_common, _),) = Counter(t for a in plain for t in a.tokens).most_common(1)
    speculation = dflash_config(directory, most_common, **draft)
    full = options["full_attention_layers"]
    windows = tuple(None if i <= int(full[-1]) else WINDOW for i in range(4))
    llm = _check_drafted(model, (options, windows), speculation, plain, engine)
    # The bonus token has a slot of its own.
    assert {m.kv_cache_spec.lookahead_tokens for m in managers(llm)} == {4}
    return llm


@pytest.mark.parametrize("sinks", [{}, {"sink_tokens": 33}], ids=["plain", "sinks"])
@pytest.mark.parametrize("draft", [FULL, SHORT_DRAFT], ids=["full_draft", "sliding_draft"])
def test_dflash_changes_no_token(
    draft: dict[str, Any],
    sinks: dict[str, Any],
    tiny_model: ModelFactory,
    engine: EngineFactory,
    tmp_path: Path,
) -> None:
    # So many full layers that V1 has those of the draft in one KV group.
    full = "0-1" if draft is SHORT_DRAFT else "0"
    options = {"window": WINDOW, "full_attention_layers": full, **sinks}
    llm = _check_dflash(options, draft, tiny_model, engine, tmp_path)
    rows = [(index, row[:2]) for index, row in _layer_rows(llm) if index >= 4]
    own = ("sliding (draft)", str(SHORT)) if draft is SHORT_DRAFT else ("full (draft)", "-")
    assert rows == [(4, own), (5, own)]


@pytest.mark.only_on("0.33/V2")
def test_dflash_with_full_and_sliding_layers(
    tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    llm = _check_dflash(HALF, {**SHORT_DRAFT, "max_window_layers": 1}, tiny_model, engine, tmp_path)
    assert [row[1] for index, row in _layer_rows(llm) if index >= 4] == ["-", str(SHORT)]


@pytest.mark.only_on("0.32/V1", "0.33/V1")
@pytest.mark.parametrize(
    ("options", "draft", "shown"),
    [
        ({"window": WINDOW}, FULL, "40, full"),
        ({"window": WINDOW}, SHORT_DRAFT, "24, 40"),
        ({"window": WINDOW, "sink_tokens": 4}, SLIDING, "windows here are 40"),
        ({"window": WINDOW, "phase": "prefill"}, SLIDING, "windows here are 40"),
        ({"window": WINDOW}, {**SLIDING, "num_key_value_heads": 1}, "windows here are 40"),
        ({}, SLIDING, "40, full"),
    ],
)
def test_v1_refuses_a_draft_model_in_a_kv_group_of_its_own(
    options: dict[str, Any],
    draft: dict[str, Any],
    shown: str,
    tiny_model: ModelFactory,
    engine: EngineFactory,
) -> None:
    resolve_here("Qwen3ForCausalLM")
    with pytest.raises(
        ValueError, match=f"Runner V1 gives a draft model the pages of .*{shown}. Use Model Runner"
    ):
        engine(
            tiny_model(**FULL),
            additional_config={"swa": options},
            speculative_config=_draft_model(tiny_model(**draft)),
        )


@pytest.mark.only_on("0.32/V1", "0.33/V1")
def test_v1_refuses_a_dflash_draft_in_several_kv_groups(
    tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    resolve_here("DFlashDraftModel")
    with pytest.raises(
        ValueError,
        match=r"groups of 1 layers here, for 2 of the draft's kind\. Use Model Runner V2",
    ):
        engine(
            tiny_model(**FULL),
            additional_config={"swa": {"window": WINDOW, "full_attention_layers": "0"}},
            speculative_config=dflash_config(tmp_path, 0, **SHORT_DRAFT),
        )


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("Qwen3MoeForCausalLM", {}, "the draft Qwen3MoeForCausalLM, only with Qwen3ForCausalLM"),
        ("LlamaForCausalLM", {}, "the draft LlamaForCausalLM, only with Qwen3ForCausalLM"),
        (None, {"parallel_drafting": True}, "and parallel_drafting; change that"),
        (None, {"use_heterogeneous_vocab": True}, "and use_heterogeneous_vocab; change that"),
        (None, {"kv_cache_dtype": "bfloat16"}, "a kv_cache_dtype of the draft's own; change"),
    ],
)
def test_other_draft_models_are_refused(
    architecture: str | None,
    arguments: dict[str, Any],
    message: str,
    tiny_model: ModelFactory,
    engine: EngineFactory,
    tmp_path: Path,
) -> None:
    resolve_here(architecture or "Qwen3ForCausalLM")
    draft = save_draft(tmp_path, architecture) if architecture else tiny_model(**SLIDING)
    with pytest.raises(ValueError, match=f"by draft_model was not tested with windows.*{message}"):
        engine(tiny_model(**SLIDING), speculative_config={**_draft_model(draft), **arguments})


def test_draft_model_without_the_manager_of_several_groups_is_refused(
    tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    with pytest.raises(ValueError, match="and --disable-hybrid-kv-cache-manager; change that"):
        engine(
            tiny_model(**SLIDING),
            speculative_config=_draft_model(tiny_model(**SLIDING)),
            disable_hybrid_kv_cache_manager=True,
        )


def test_draft_follows_its_own_config(
    tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    """So what is wrong in it is not to be corrected by options."""
    draft = save_draft(
        tmp_path, "Qwen3ForCausalLM", use_sliding_window=True, layer_types=["full_attention"]
    )
    with pytest.raises(ValueError, match=f"the draft model {tmp_path} has the windows of its own"):
        engine(tiny_model(**SLIDING), speculative_config=_draft_model(draft))


def test_sliding_draft_beside_another_model_is_refused(
    tiny_llama: Path, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    with pytest.raises(ValueError, match=r"not tested beside LlamaForCausalLM.*use_sliding_window"):
        engine(tiny_llama, speculative_config=_draft_model(tiny_model(**SLIDING)))


def test_weights_of_a_draft_model_are_checked(
    tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    draft = save_draft(tmp_path, "Qwen3ForCausalLM", **{**SLIDING, "num_hidden_layers": 4})
    save_file({"norm.weight": torch.ones(64)}, draft / "model.safetensors")
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} lack"):
        engine(tiny_model(**SLIDING), speculative_config=_draft_model(draft))
