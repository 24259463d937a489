"""An engine in this process that scores a text: log-probabilities, and pages held meanwhile."""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import RequestOutputKind

from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.engines.forced import FORCED_TOKENS
from swa_vllm.tools.engines.setup import Setup

# Generated behind a text that is only scored: in the second step it holds what decoding holds.
NUM_EXTRA_TOKENS = 3


@dataclass(frozen=True)
class Scored:
    """What an engine says of one text that it serves alone.

    Attributes:
        logprobs: of every token of the text but the first, the model's own, in nats.
        pages: pool pages that the request held after each step but the last, which frees them.
        computed: tokens that were computed by then.
        greedy: of every token of the text but the first, the one that the model likes best there.
    """

    logprobs: list[float]
    pages: list[int]
    computed: list[int]
    greedy: list[int]


class ScoringEngine:
    """An engine that scores one text at a time; a context manager that ends it.

    Attributes:
        bytes_per_page: bytes of a page of the pool, in all layers of a KV group.
        num_groups: KV groups.
        has_windows: whether a layer slides.
    """

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
        self.has_windows = any(isinstance(spec, SWASpec | PromptCacheSpec) for spec in specs)

    @classmethod
    def start(cls, setup: Setup, options: Mapping[str, Any]) -> "ScoringEngine":
        """Start a new engine with these ``swa`` options.

        Raises:
            ValueError: the model does not know of windows.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its pages are to be counted
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on GPUs
        # vLLM collects garbage nine times in a start, each time through all modules; unfreezes at
        # its end.
        gc.freeze()
        engine = cls(
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
        if "window" in options and not engine.has_windows:
            engine.__exit__()
            raise ValueError(
                f"{setup.model} has no window although one was asked for: only Qwen3 models take "
                "the swa options, others ignore them"
            )
        return engine

    def __enter__(self) -> "ScoringEngine":
        return self

    def __exit__(self, *_: object) -> None:
        # As at a start: vLLM collects twice in a shutdown, and unfreezes before the second.
        gc.freeze()
        self.llm = self._pool = self._scheduler = None
        cleanup_dist_env_and_memory()  # it collects garbage too

    def score(
        self,
        tokens: Sequence[int],
        num_decoded: int = 0,
        on_step: Callable[[int], object] = lambda num_computed: None,
    ) -> Scored:
        """Serve a text of two tokens or more, and score each token but the first.

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
            prompt_logprobs=1,
            logprobs=1,
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
        greedy = [min(step, key=lambda token: step[token].rank) for step in steps]
        return Scored(logprobs, pages, computed, greedy)
