"""In-process engines: start, greedy answers by token ids, page managers."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.metrics.reader import Counter

from swa_backend.layers import resolve_layers
from swa_backend.options import SWAConfigError, SWAOptions
from swa_vllm.kv_cache.manager import SWAManager
from tests.helpers.page_checks import held_pages
from tests.helpers.tiny_models import PAGE_SIZE, WINDOW, random_prompts

# What the fixtures ``tiny_model`` and ``engine`` are.
ModelFactory = Callable[..., Path]
EngineFactory = Callable[..., LLM]
# Not the whole GPU, on which other tests run beside.
ON_GPU = (
    {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    if torch.cuda.is_available()
    else {}
)


# Of every engine of these tests, unless it says otherwise.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "block_size": PAGE_SIZE,
    "num_gpu_blocks_override": 256,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "seed": 0,
    **ON_GPU,
}


def start_engine(model: Path | str, **kwargs: Any) -> LLM:
    """An in-process engine; ``kwargs`` are arguments of ``LLM``.

    Where it serves windows, pages that nobody holds are full of NaN.
    """
    if _can_poison(model, kwargs):
        options = kwargs.get("additional_config", {}).get("swa", {})
        kwargs["additional_config"] = {"swa": {"debug_poison": True, **options}}
    gc.freeze()  # vLLM collects nine times while it starts, and unfreezes at its end
    return LLM(str(model), **{**ENGINE_ARGUMENTS, **kwargs})


def _can_poison(model: Path | str, kwargs: dict[str, Any]) -> bool:
    if (
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0"
        or os.environ.get("VLLM_PLUGINS") == ""
        or kwargs.get("disable_hybrid_kv_cache_manager")
    ):
        return False
    options = kwargs.get("additional_config", {}).get("swa", {})
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        return resolve_layers(config, SWAOptions.from_dict(options)).slides
    except (SWAConfigError, AttributeError):  # refused, or not a Qwen3
        return False


def resolve_here(architecture: str) -> None:
    """Import the class registered for ``architecture`` into this process, where vLLM finds it.

    vLLM inspects a class that it has not imported in a new process, which takes longer than a test.
    """
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def stop_engine() -> None:
    """Free what the engine that was just dropped leaves in this process."""
    gc.collect()
    cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one prompt, their log-probabilities, and the prompt's cached tokens."""

    tokens: list[int]
    logprobs: list[float]
    num_cached_tokens: int


def greedy(num_tokens: int, **kwargs: Any) -> SamplingParams:
    """Exactly ``num_tokens`` greedy tokens with their log-probabilities."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=num_tokens,
        ignore_eos=True,
        logprobs=1,
        detokenize=False,
        **kwargs,
    )


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    num_tokens: int = 24,
    lora: LoRARequest | None = None,
) -> list[Answer]:
    """Greedy answers of exactly ``num_tokens`` tokens."""
    params = greedy(num_tokens)
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    outputs = llm.generate(inputs, params, lora_request=lora, use_tqdm=False)
    return [to_answer(output.outputs[0], output.num_cached_tokens or 0) for output in outputs]


def to_answer(completion: CompletionOutput, num_cached_tokens: int = 0) -> Answer:
    """One completion that was asked for with log-probabilities."""
    tokens = list(completion.token_ids)
    steps = completion.logprobs or ()
    logprobs = [step[t].logprob for step, t in zip(steps, tokens, strict=True)]
    return Answer(tokens, logprobs, num_cached_tokens)


def scheduler(llm: LLM) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def counting_preemptions(llm: LLM) -> Iterator[list[str]]:
    """Ids of the requests that have to start over."""
    preempted: list[str] = []
    engine = scheduler(llm)
    preempt = engine._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    engine._preempt_request = counted
    try:
        yield preempted
    finally:
        del engine._preempt_request


def managers(llm: LLM) -> list[SWAManager]:
    """Page managers of the windowed KV groups."""
    coordinator = scheduler(llm).kv_cache_manager.coordinator
    return [m for m in coordinator.single_type_managers if isinstance(m, SWAManager)]


def num_free_pages(llm: LLM) -> int:
    """Free pages of the pool."""
    return int(scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks())


def num_held_pages(llm: LLM) -> int:
    """Pages of the pool that requests hold; none are seen of an engine in another process."""
    if not isinstance(llm.llm_engine.engine_core, InprocClient):
        return 0
    return len(held_pages(scheduler(llm).kv_cache_manager.block_pool))


def attention_layers(llm: LLM) -> list[Any]:
    """Attention layers of the model, in layer order."""
    (found,) = llm.apply_model(lambda m: [layer.self_attn.attn for layer in m.model.layers])
    return list(found)


def described_prompts() -> list[list[int]]:
    """The prompts whose answers :func:`describe` has."""
    return random_prompts([1, 2 * WINDOW, 7 * WINDOW])


def describe(llm: LLM) -> dict[str, Any]:
    """Classes that serve a model, and its greedy answers, as JSON values."""
    (modules,) = llm.apply_model(lambda m: [type(x).__qualname__ for x in m.modules()])
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if hasattr(layer, "attn_backend")]
    answers = generate(llm, described_prompts())
    return {
        "modules": modules,
        "backends": [layer.attn_backend.get_name() for layer in layers],
        "specs": [type(group.kv_cache_spec).__name__ for group in groups],
        "answers": [(answer.tokens, answer.logprobs) for answer in answers],
    }


# Drafts by n-grams, some of which are wrong where answers repeat themselves now and then.
NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 1,
    "prompt_lookup_min": 1,
}


def check_drafts_were_verified(llm: LLM) -> None:
    """Some of the drafts were accepted and some rejected; the engine logs its statistics."""
    counters = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafted
