"""vLLM's features on windowed models: the same results as without them, or Hugging Face's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForSequenceClassification, Qwen3Model
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.helpers.engines import (
    Answer,
    EngineFactory,
    ModelFactory,
    attention_layers,
    describe,
    generate,
    to_answer,
)
from tests.helpers.quantized_models import needs_fp8_kernels
from tests.helpers.runners import RUNNER
from tests.helpers.tiny_models import (
    FULL,
    MIXED,
    SLIDING,
    WINDOW,
    Oracle,
    random_prompts,
    save_lora,
    tiny_config,
)

LENGTHS = (5, WINDOW + 1, 4 * WINDOW)


def _tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def _check_chosen(prompts: list[list[int]], answers: list[Answer], oracle: Oracle) -> None:
    """Log-probabilities of the chosen tokens are the oracle's, within its fp32 noise."""
    for prompt, answer in zip(prompts, answers, strict=True):
        score = oracle.score(prompt + answer.tokens)
        rows = score.logprobs[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        got = torch.tensor(answer.logprobs, dtype=torch.float64)
        assert (got - chosen).abs().max() <= score.noise


@pytest.fixture
def plain(engine: EngineFactory, tiny_model: ModelFactory) -> list[list[int]]:
    """Greedy tokens of the mixed model with no feature on."""
    return _tokens(generate(engine(tiny_model(**MIXED)), random_prompts(LENGTHS)))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(
    tied: bool, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    model = tiny_model(**MIXED, tie_word_embeddings=tied)
    prompts = random_prompts(LENGTHS)
    _check_chosen(prompts, generate(engine(model), prompts), Oracle(model))


def test_depth_pruned_checkpoint_with_shortened_layer_types(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model(**{**MIXED, "num_hidden_layers": 3, "layer_types": layer_types})
    llm = engine(model)
    assert [layer.sliding_window for layer in attention_layers(llm)] == [WINDOW, None, WINDOW]
    prompts = random_prompts(LENGTHS)
    _check_chosen(prompts, generate(llm, prompts), Oracle(model))


def test_prompt_logprobs(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model = tiny_model(**MIXED)
    (prompt,) = random_prompts([4 * WINDOW])
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine(model, max_num_batched_tokens=16).generate(
        [{"prompt_token_ids": prompt}], params, use_tqdm=False
    )
    score = Oracle(model).score(prompt)
    expected = score.logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    got = [
        entry[token].logprob
        for entry, token in zip(output.prompt_logprobs, prompt, strict=True)
        if entry
    ]
    assert (torch.tensor(got, dtype=torch.float64) - expected).abs().max() <= score.noise


def test_several_samples_of_one_prompt(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model = tiny_model(**MIXED)
    (prompt,) = random_prompts([3 * WINDOW])
    params = SamplingParams(
        n=3, temperature=1.0, seed=7, max_tokens=20, ignore_eos=True, logprobs=0, detokenize=False
    )
    (output,) = engine(model).generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    answers = [to_answer(sample) for sample in output.outputs]
    assert len({tuple(answer.tokens) for answer in answers}) == 3
    _check_chosen([prompt] * 3, answers, Oracle(model))


def test_ngram_speculative_decoding(
    plain: list[list[int]],
    engine: EngineFactory,
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In a process of its own: it imports numba, after which vLLM 0.32 starts no second engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    llm = engine(tiny_model(**MIXED), speculative_config=speculation)
    assert _tokens(generate(llm, random_prompts(LENGTHS))) == plain


def test_compiled_model(
    plain: list[list[int]], engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    # V2 would warm up vLLM's kernel of top-k and top-p, which Triton's interpreter cannot run.
    warm_up = {"kernel_config": {"enable_jit_warmup": False}} if RUNNER == "0.33/V2" else {}
    llm = engine(tiny_model(**MIXED), enforce_eager=False, **warm_up)
    assert _tokens(generate(llm, random_prompts(LENGTHS))) == plain


def test_structured_output(demo_model: dict[str, Path], engine: EngineFactory) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    llm = engine(demo_model["mixed"], skip_tokenizer_init=False, dtype="bfloat16")
    text = "The ship sailed north. " * 60 + "Which city is the capital of Italy? Answer:"
    choice = StructuredOutputsParams(choice=["Paris", "Rome", "Berlin"])
    params = SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=choice)
    (output,) = llm.generate([text], params, use_tqdm=False)
    assert output.outputs[0].text in ("Paris", "Rome", "Berlin")


@needs_fp8_kernels
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        (SLIDING, {}),
        # A window that nothing reaches the end of, in half of the layers.
        (FULL, {"window": 500, "full_attention_layers": "0-1"}),
    ],
    ids=["sliding", "mixed"],
)
def test_fp8_kv_cache_is_stocks(
    checkpoint: dict[str, Any],
    options: dict[str, Any],
    describe_stock: Callable[..., Any],
    engine: EngineFactory,
    tiny_model: ModelFactory,
) -> None:
    model, fp8 = tiny_model(**checkpoint), {"kv_cache_dtype": "fp8"}
    llm = engine(model, **fp8, additional_config={"swa": options})
    assert [layer.kv_cache_dtype for layer in attention_layers(llm)] == ["fp8"] * 4
    answers = describe_stock(model, **fp8)["answers"]
    assert [list(a) for a in describe(llm)["answers"]] == answers


@needs_fp8_kernels
def test_fp8_kv_cache_can_skip_the_sliding_layers(
    describe_stock: Callable[..., Any], engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    fp8 = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    mixed = engine(tiny_model(**MIXED), **fp8)
    assert [a.kv_cache_dtype for a in attention_layers(mixed)] == ["fp8"] * 2 + ["auto"] * 2
    del mixed
    sliding = describe(engine(tiny_model(**SLIDING), **fp8))
    answers = describe_stock(tiny_model(**SLIDING))["answers"]
    assert [list(a) for a in sliding["answers"]] == answers


def test_lora_equals_merged_weights(
    engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(**MIXED)
    save_lora(tmp_path / "adapter", model, tmp_path / "merged")
    llm = engine(model, enable_lora=True, max_lora_rank=8)
    prompts = random_prompts(LENGTHS)
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    answers = generate(llm, prompts, lora=adapter)
    _check_chosen(prompts, answers, Oracle(tmp_path / "merged"))


def test_embedding_model_equals_hugging_face(
    engine: EngineFactory, demo_model: dict[str, Path]
) -> None:
    model = demo_model["mixed"]
    llm = engine(model, skip_tokenizer_init=False, runner="pooling", convert="embed")
    prompts = random_prompts((5, 129, 300))
    outputs = llm.embed([{"prompt_token_ids": p} for p in prompts], use_tqdm=False)
    exact = Qwen3Model.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            last = exact(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(last, dim=0)
        got = torch.tensor(output.outputs.embedding, dtype=torch.float64)
        assert (got - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps  # of unit length


def test_sequence_classifier_equals_hugging_face(engine: EngineFactory, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(**MIXED, num_labels=3, pad_token_id=0)
    Qwen3ForSequenceClassification(config).float().save_pretrained(tmp_path)
    llm = engine(tmp_path)
    assert [layer.sliding_window for layer in attention_layers(llm)] == [None] * 2 + [WINDOW] * 2
    exact = Qwen3ForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    )
    prompts = [[t or 1 for t in p] for p in random_prompts(LENGTHS)]  # 0 is padding there
    outputs = llm.classify([{"prompt_token_ids": p} for p in prompts], use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = exact(torch.tensor([prompt])).logits[0].softmax(-1)
        got = torch.tensor(output.outputs.probs, dtype=torch.float64)
        assert (got - expected).abs().max() < 1e-5
