"""Features together: every two of them are right, or refused by name.

Right is what a dense model in fp64 says, within its fp32 noise. What takes processes of its own
(n-grams, compiled models, tensor parallelism) is in the matrix of ``-m full``; by default
``test_features.py``, ``test_sinks.py`` and ``test_ray.py`` run it, alone. vLLM turns asynchronous
scheduling off on CPUs: of its steps in flight ``test_page_machine.py`` has the pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.eagle3 import save_eagle3
from tests.helpers.engines import Answer, EngineFactory, ModelFactory, resolve_here, to_answer
from tests.helpers.pairwise import pairwise
from tests.helpers.quantized_models import needs_fp8_kernels
from tests.helpers.runners import RUNNER
from tests.helpers.tiny_models import (
    FULL,
    SLIDING,
    VOCAB_SIZE,
    WINDOW,
    OracleScores,
    random_prompts,
    save_lora,
    save_tiny_model,
)

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
NIXL = {**CONNECTOR, "kv_connector": "NixlConnector"}
# Of each feature its values, the plain one first: engine arguments, and in "swa" options.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "chunk": {"512": {"max_num_batched_tokens": 512}, "16": {"max_num_batched_tokens": 16}},
    "cache": {"on": {}, "off": {"enable_prefix_caching": False}},
    "drafts": {
        "none": {},
        "eagle3": {"speculative_config": {"method": "eagle3", "num_speculative_tokens": 3}},
        "ngram": {"speculative_config": NGRAM},
    },
    "lora": {"no": {}, "yes": {"enable_lora": True, "max_lora_rank": 8}},
    "grammar": {"no": {}, "yes": {"skip_tokenizer_init": False}},
    "kv": {"auto": {}, "fp8": {"kv_cache_dtype": "fp8"}},
    "sinks": {
        "0": {},
        "4": {"swa": {"sink_tokens": 4}},
        "shifted": {"swa": {"sink_tokens": 4, "position_shift": True}},
    },
    "phase": {name: {"swa": {"phase": name}} for name in ("both", "prefill", "decode")},
    "pages": {name: {"swa": {"prefill_pages": name}} for name in ("auto", "survivors", "all")},
    "pp": {"1": {}, "2": {"pipeline_parallel_size": 2}},
    "tp": {"1": {}, "2": {"tensor_parallel_size": 2}},
    "async": {"off": {"async_scheduling": False}, "on": {"async_scheduling": True}},
    "compile": {"no": {"enforce_eager": True}, "yes": {"enforce_eager": False}},
    "hybrid": {"on": {}, "off": {"disable_hybrid_kv_cache_manager": True}},
    "connector": {
        "none": {},
        "nixl": {"kv_transfer_config": NIXL},
        "other": {"kv_transfer_config": CONNECTOR},
        "offloading": {"kv_offloading_size": 1},
    },
}
NO_HYBRID = "disable-hybrid-kv-cache-manager"
IS_V1 = RUNNER.endswith("V1")
# Values that are refused, alone or together, and by which name.
REFUSED: list[tuple[set[str], str]] = [
    ({"pp=2"}, "pipeline_parallel_size=2 fails in vLLM's CPU build"),
    *(({"pp=2", f"drafts={d}"}, "not tested with windows and spec") for d in ("eagle3", "ngram")),
    ({"connector=other"}, "the KV connector ExampleConnector .* one table of pages"),
    ({"connector=offloading"}, "KV cache offloading .* does not start without a GPU"),
    *(
        ({"connector=nixl", other}, f"NixlConnector cannot be had with {what}")
        for other, what in {
            "sinks=4": "swa.sink_tokens=4",
            "sinks=shifted": "swa.sink_tokens=4",
            "phase=prefill": 'swa.phase="prefill"',
            "phase=decode": 'swa.phase="decode"',
            "hybrid=off": f"--{NO_HYBRID}",
            "drafts=eagle3": "speculative decoding",
            "drafts=ngram": "speculative decoding",
            "pp=2": "pipeline stages",
        }.items()
    ),
    ({"sinks=4", "kv=fp8"}, "sink_tokens cannot be had with kv_cache_dtype=fp8"),
    ({"sinks=shifted", "kv=fp8"}, "sink_tokens cannot be had with kv_cache_dtype=fp8"),
    ({"sinks=4", "hybrid=off"}, f"sink_tokens cannot be had with --{NO_HYBRID}"),
    ({"sinks=shifted", "hybrid=off"}, f"sink_tokens cannot be had with --{NO_HYBRID}"),
    ({"phase=prefill", "drafts=eagle3"}, 'phase="prefill" was not tested with speculative'),
    ({"phase=prefill", "pages=survivors"}, 'phase="prefill" keeps every page'),
    ({"phase=decode", "drafts=eagle3"}, 'phase="decode" was not tested with speculative'),
    ({"phase=decode", "pages=survivors"}, 'phase="decode" keeps every page'),
    ({"phase=decode", "sinks=shifted"}, 'position_shift moves sink tokens, and with swa.phase="de'),
    ({"pages=survivors", "hybrid=off"}, f'"survivors" cannot be had: --{NO_HYBRID}'),
    ({"phase=decode", "kv=fp8"}, 'phase="decode" cannot be had with kv_cache_dtype=fp8'),
    ({"phase=decode", "hybrid=off"}, f'phase="decode" frees pages, and --{NO_HYBRID}'),
    # By vLLM itself, whose newer runner has both.
    *([({"drafts=ngram", "async=on"}, "(?i)async scheduling is .*support")] if IS_V1 else []),
]


def _arguments(values: dict[str, str], draft: Path) -> dict[str, Any]:
    """Arguments of an engine with these values, and the plain ones of other features."""
    swa: dict[str, Any] = {"window": WINDOW, "full_attention_layers": "0-1"}
    arguments: dict[str, Any] = {}
    for feature, choices in FEATURES.items():
        chosen = dict(choices[values.get(feature, next(iter(choices)))])
        swa |= chosen.pop("swa", {})
        arguments |= chosen
    speculation = dict(arguments.get("speculative_config", {}))
    if speculation.get("method") == "eagle3":
        arguments["speculative_config"] = {**speculation, "model": str(draft)}
    return {**arguments, "additional_config": {"swa": swa}}


@dataclass(frozen=True)
class Checkpoints:
    """A model whose tokens are characters, an adapter of it, both merged, and a draft."""

    model: Path
    adapter: Path
    merged: Path
    draft: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("pairs")
    model = save_tiny_model(root / "model", **FULL)
    vocabulary = {_character(token): token for token in range(VOCAB_SIZE)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=_character(0))),
        eos_token=_character(VOCAB_SIZE - 1),
    ).save_pretrained(model)
    save_lora(root / "adapter", model, root / "merged")
    (root / "draft").mkdir()
    # With the target's window, in a layer that is vLLM's own.
    draft = save_eagle3(root / "draft", **SLIDING)
    resolve_here("Eagle3Qwen3ForCausalLM")
    return Checkpoints(model, root / "adapter", root / "merged", draft)


def _character(token: int) -> str:
    return chr(0x4E00 + token)


# --- refused --------------------------------------------------------------------------------------


def _config(made: Checkpoints, values: dict[str, str]) -> VllmConfig:
    arguments = {"skip_tokenizer_init": True, **_arguments(values, made.draft)}
    return EngineArgs(
        str(made.model), dtype="float32", max_model_len=512, **arguments
    ).create_engine_config()


def _check_servable(config: VllmConfig) -> None:
    check_servable(config, SWAConfig.from_vllm(config))


@pytest.mark.parametrize(("one", "other"), combinations(FEATURES, 2))
def test_two_features_are_accepted_or_refused_by_name(
    one: str, other: str, made: Checkpoints
) -> None:
    for first, second in product(FEATURES[one], FEATURES[other]):
        names = {f"{one}={first}", f"{other}={second}"}
        messages = [message for refused, message in REFUSED if refused <= names]
        if messages:
            with pytest.raises(ValueError, match="|".join(messages)):
                _check_servable(_config(made, {one: first, other: second}))
        else:
            _check_servable(_config(made, {one: first, other: second}))


def test_shift_without_sinks_is_refused(made: Checkpoints) -> None:
    swa = {"window": WINDOW, "position_shift": True}
    arguments = EngineArgs(
        str(made.model), skip_tokenizer_init=True, additional_config={"swa": swa}
    )
    with pytest.raises(ValueError, match="position_shift moves sink tokens, and there are none"):
        arguments.create_engine_config()


def test_vllm_turns_asynchronous_scheduling_off_on_cpus(made: Checkpoints) -> None:
    assert not _config(made, {"async": "on"}).scheduler_config.async_scheduling


@pytest.mark.skipif(not needs_fp8_kernels.args[0], reason="this processor has the kernels")
def test_vllm_refuses_fp8_where_the_processor_has_no_kernels(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    with pytest.raises(NotImplementedError, match="FP8 KV cache on CPU requires x86 with AVX-512"):
        engine(tiny_model(**SLIDING), kv_cache_dtype="fp8")


# --- right ----------------------------------------------------------------------------------------

# Those whose engines live in this process, and what the full matrix adds.
QUICK = ("chunk", "cache", "drafts", "lora", "grammar", "sinks", "phase", "pages", "hybrid")
SLOW = {"drafts": "ngram", "compile": "yes", "tp": "2"}
Case = tuple[str, ...]


def _is_served(features: tuple[str, ...]) -> Callable[[Case], bool]:
    def is_served(case: Case) -> bool:
        names = {f"{feature}={value}" for feature, value in zip(features, case, strict=True)}
        return not any(refused <= names for refused, _ in REFUSED)

    return is_served


def _cases(features: tuple[str, ...], without: str = "") -> list[Any]:
    values = [[v for v in FEATURES[f] if v != without] for f in features]
    found = [
        dict(zip(features, c, strict=True)) for c in pairwise(*values, allowed=_is_served(features))
    ]
    return [pytest.param(c, id="-".join(c.values()), marks=_limits(c)) for c in found]


def _limits(values: dict[str, str]) -> list[pytest.MarkDecorator]:
    """What vLLM itself fails at: see ``test_cpu_build_limits.py``."""
    fails_on_v2 = values["drafts"] != "none" and values["lora"] == "yes"
    return [pytest.mark.only_on("0.32/V1", "0.33/V1")] if fails_on_v2 else []


@pytest.mark.parametrize("values", _cases(QUICK, without="ngram"))
def test_features_together_equal_a_dense_model(
    values: dict[str, str], made: Checkpoints, engine: EngineFactory
) -> None:
    _check(values, made, engine)


@pytest.mark.full
@pytest.mark.parametrize("values", _cases((*QUICK, "compile", "tp")))
def test_features_together_equal_a_dense_model_full(
    values: dict[str, str],
    made: Checkpoints,
    engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if any(values[feature] == value for feature, value in SLOW.items()):
        # In a process of its own, as numba, compilers and workers want it.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    _check(values, made, engine)


# Tokens that the grammar allows: each is one character.
ALLOWED = torch.arange(100, 300)
GRAMMAR = StructuredOutputsParams(regex=f"[{_character(100)}-{_character(299)}]{{200}}")
PROMPTS = random_prompts((5, WINDOW + 1, 100, 170))


def _serve(llm: LLM, lora: LoRARequest | None, has_grammar: list[bool]) -> list[Answer]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=16,
                ignore_eos=True,
                logprobs=1,
                detokenize=False,
                structured_outputs=GRAMMAR if grammar else None,
            )
            for grammar in has_grammar
        ],
        lora_request=lora,
        use_tqdm=False,
    )
    return [to_answer(output.outputs[0], output.num_cached_tokens or 0) for output in outputs]


@cache
def _dense(model: Path, sinks: str, phase: str) -> DenseQwen3:
    windows = (None, None, WINDOW, WINDOW)
    num_sinks, shift = 0 if sinks == "0" else 4, sinks == "shifted"
    return DenseQwen3(model, Sight(windows, num_sinks, shift, phase=phase))


@cache  # engines that are right answer alike
def _score(
    model: Path, sinks: str, phase: str, tokens: tuple[int, ...], num_prompt: int
) -> OracleScores:
    return _dense(model, sinks, phase).score(tokens, num_prompt)


def _check(values: dict[str, str], made: Checkpoints, engine: EngineFactory) -> None:
    """Requests with and without a grammar in one batch, which is served twice."""
    # No more at once than vLLM allows with adapters, drafts and small chunks.
    llm = engine(made.model, max_num_seqs=4, **_arguments(values, made.draft))
    # All or none: see test_cpu_build_limits.py.
    lora = LoRARequest("a", 1, str(made.adapter)) if values["lora"] == "yes" else None
    has_grammar = [values["grammar"] == "yes" and i >= 2 for i in range(len(PROMPTS))]
    answers = _serve(llm, lora, has_grammar)
    model = made.merged if lora else made.model
    for prompt, answer, grammar in zip(PROMPTS, answers, has_grammar, strict=True):
        sight = values["sinks"], values["phase"]
        score = _score(model, *sight, (*prompt, *answer.tokens), len(prompt))
        _check_answer(len(prompt), answer, score, ALLOWED if grammar else None)
    again = _serve(llm, lora, has_grammar)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert (again[-1].num_cached_tokens > 0) == (values["cache"] == "on")


def _check_answer(
    num_prompt: int, answer: Answer, score: OracleScores, allowed: torch.Tensor | None
) -> None:
    rows = score.logprobs[num_prompt - 1 : -1]
    if allowed is not None:  # vLLM masks the others before it takes log-probabilities
        assert set(answer.tokens) <= set(allowed.tolist())
        masked = torch.full_like(rows, -torch.inf)
        masked[:, allowed] = rows[:, allowed]
        rows = masked.log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert (rows.max(dim=-1).values - chosen).max() <= score.noise
    got = torch.tensor(answer.logprobs, dtype=torch.float64)
    assert (got - chosen).abs().max() <= score.noise
