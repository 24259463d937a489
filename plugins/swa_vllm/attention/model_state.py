"""The lengths of prompts for metadata builders, by Model Runner V2."""

from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState


class _GivesPromptLens(DefaultModelState):
    """Mixin before a state of vLLM's: gives builders ``rswa_prefix_lens``.

    vLLM has the lengths at hand for its own kind of window (R-SWA) only, where (0.33) a batch that
    is padded for a CUDA graph fails in TRITON_ATTN.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By the runner's index of a request.
        self._prompt_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._prompt_lens[req_index] = new_req_data.prompt_len

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        input_batch.prompt_lens = self._prompt_lens[input_batch.idx_mapping]
        return super().prepare_attn(input_batch, *args, **kwargs)


class PromptLensState(_GivesPromptLens):
    """vLLM's state of a model whose layers all attend."""


class HybridPromptLensState(_GivesPromptLens, MambaHybridModelState):
    """vLLM's state of a model that has layers with linear attention."""
