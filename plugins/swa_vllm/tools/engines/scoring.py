"""Engines in this process, one after the other: log-probabilities of a text, and pages held."""

import argparse
import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import RequestOutputKind

from swa_backend.config import SWAOptions
from swa_backend.layers import LayerPlan, resolve_layers
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.common.arguments import check_numbers
from swa_vllm.tools.common.sizing import MODEL_DTYPES
from swa_vllm.tools.engines.forced import FORCED_TOKENS

FULL_ATTENTION: Mapping[str, Any] = {"enabled": False}
# Generated behind a text that is only scored: in the second step it holds what decoding holds.
NUM_EXTRA_TOKENS = 3


@dataclass(frozen=True)
class Setup:
    """What all engines of a measurement have in common.

    Attributes:
        max_num_batched_tokens: of a prefill chunk; the logits of all its tokens are computed.
        block_size: tokens a page; None leaves it to vLLM.
        arguments: more arguments of ``LLM``.
    """

    model: str
    max_model_len: int
    dtype: str = "auto"
    max_num_batched_tokens: int = 512
    block_size: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """One request, served alone.

    Attributes:
        logprobs: of every token of the text but the first, the model's own, in nats.
        pages: pool pages that the request held after each step but the last, which frees them.
        computed: tokens that were computed by then.
    """

    logprobs: list[float]
    pages: list[int]
    computed: list[int]


def add_setup_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that :func:`setup_of` reads."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: a directory or a hub's name")
    parser.add_argument(
        "--dtype", choices=MODEL_DTYPES, default="auto", help="as vLLM's (default: auto)"
    )
    parser.add_argument(
        "--chunk", type=int, default=512, help="tokens of a prefill chunk (default: 512)"
    )
    parser.add_argument("--block-size", type=int, help="tokens of a page (default: vLLM's)")


def setup_of(
    args: argparse.Namespace, hf_config: Any, max_model_len: int, **arguments: Any
) -> Setup:
    """The engines that the command line asks for, whose RoPE table reaches ``max_model_len``."""
    check_numbers(args, ("chunk", "block_size"))
    if max_model_len > hf_config.max_position_embeddings:
        check_table_can_grow(hf_config, max_model_len)
        # vLLM sizes its RoPE table from it.
        arguments["hf_overrides"] = {"max_position_embeddings": max_model_len}
    return Setup(args.model, max_model_len, args.dtype, args.chunk, args.block_size, arguments)


def check_table_can_grow(hf_config: Any, max_model_len: int) -> None:
    """Refuse a RoPE whose table does not follow ``max_position_embeddings``.

    Raises:
        ValueError: it is of such a kind.
    """
    rope: Mapping[str, Any] = getattr(hf_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(
            f"{max_model_len} tokens are more than max_position_embeddings="
            f"{hf_config.max_position_embeddings}, and RoPE of the type {kind!r} cannot be made "
            "longer by that key; ask for fewer tokens"
        )


def text_config(model: str) -> Any:
    """Hugging Face's config of a checkpoint's text layers.

    Raises:
        ValueError: there is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: no directory with the config.json of a model, and none of the hub's that "
            f"can be had from here; give one ({error})"
        ) from error


def check_options(hf_config: Any, options: Mapping[str, Any]) -> LayerPlan:
    """What the layers do under ``swa`` options; says before an engine starts what is refused."""
    return resolve_layers(hf_config, SWAOptions.from_dict(dict(options)))


class Served:
    """An engine that serves one request at a time; a context manager that ends it."""

    def __init__(self, llm: LLM) -> None:
        """Take an in-process engine without prefix caching, whose pool nobody else uses."""
        self.llm: LLM | None = llm
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        config = self._scheduler.kv_cache_config
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._num_free = self._pool.get_num_free_blocks()
        # Tensors are views of one allocation, of this size each.
        self.bytes_per_page = config.kv_cache_tensors[0].size // config.num_blocks
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        self.num_groups = len(specs)
        self.has_windows = any(isinstance(spec, SWASpec) for spec in specs)

    @classmethod
    def start(cls, setup: Setup, options: Mapping[str, Any]) -> "Served":
        """A new engine with these ``swa`` options.

        Raises:
            ValueError: the model does not know of windows.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its pages are to be counted
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on GPUs
        served = cls(
            LLM(
                setup.model,
                dtype=setup.dtype,
                max_model_len=setup.max_model_len,
                max_num_batched_tokens=setup.max_num_batched_tokens,
                block_size=setup.block_size,
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_prefix_caching=False,
                max_num_seqs=8,
                logprobs_mode="raw_logprobs",
                additional_config={"swa": dict(options)},
                **setup.arguments,
            )
        )
        if "window" in options and not served.has_windows:
            served.__exit__()
            raise ValueError(
                f"{setup.model} has no window although one was asked for: only Qwen3 models take "
                "the swa options, others ignore them"
            )
        return served

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.llm = self._pool = self._scheduler = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def score(
        self,
        tokens: Sequence[int],
        num_decoded: int = 0,
        on_step: Callable[[int], object] = lambda num_computed: None,
    ) -> Scored:
        """Serve a text of two tokens or more.

        Args:
            num_decoded: how many of its last tokens are decoded one by one, each forced whatever
                the model would say; the others are the prompt. The engine needs
                :class:`~swa_vllm.tools.engines.forced.ForcedTokens`.
            on_step: called after each step but the last with the number of tokens computed.
        """
        assert self.llm is not None
        engine, num_prompt = self.llm.llm_engine, len(tokens) - num_decoded
        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_decoded or NUM_EXTRA_TOKENS,
            prompt_logprobs=0,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={FORCED_TOKENS: list(tokens[num_prompt:])} if num_decoded else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request("text", {"prompt_token_ids": list(tokens[:num_prompt])}, params)
        outputs, pages, computed = [], list[int](), list[int]()
        while engine.has_unfinished_requests():
            outputs += engine.step()
            for request in self._scheduler.requests.values():
                pages.append(self._num_free - self._pool.get_num_free_blocks())
                computed.append(request.num_computed_tokens)
                on_step(computed[-1])
        (output,) = outputs
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs[:num_decoded]]
        logprobs = [step[token].logprob for token, step in zip(tokens[1:], steps, strict=True)]
        return Scored(logprobs, pages, computed)


def perplexity(logprobs: Sequence[float]) -> float:
    """Perplexity of tokens that a model gives these log-probabilities."""
    return math.exp(-math.fsum(logprobs) / len(logprobs))
