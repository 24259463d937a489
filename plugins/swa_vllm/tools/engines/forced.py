"""Teacher forcing: a given text is decoded, by means of vLLM's logits processors."""

from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_TOKENS = "swa_forced_tokens"  # in a request's extra_args


class ForcedTokens(AdapterLogitsProcessor):
    """Make a request decode the tokens in its ``extra_args`` first, whatever the model would say.

    vLLM takes log-probabilities of the logits before processors change them (``logprobs_mode``
    ``raw_logprobs``, its default), so those of the forced tokens are the model's own.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        tokens = (sampling_params.extra_args or {}).get(FORCED_TOKENS)
        if tokens is not None and len(tokens) > (sampling_params.max_tokens or 0):
            raise ValueError(
                f"{FORCED_TOKENS} has {len(tokens)} tokens and max_tokens is "
                f"{sampling_params.max_tokens}; it must be as many, or more"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        tokens: list[int] | None = (params.extra_args or {}).get(FORCED_TOKENS)
        if tokens is None:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) >= len(tokens):
                return logits
            forced: Any = torch.full_like(logits, float("-inf"))
            forced[tokens[len(output)]] = 0.0
            return forced

        return force
