"""Lets vLLM's Model Runner V2 capture and replay CUDA graphs on a CPU.

There are no CUDA graphs on a CPU, and vLLM has no hook to put others in their place. So this file,
and no other one, replaces parts of torch, Triton and vLLM, and :func:`installed` puts every one of
them back. What is replaced says only that there are graphs, and what a graph is. What is captured
and when, how a batch is padded, what is replayed and that the workspace is locked after the capture
stays vLLM's own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import workspace

from tests.helpers.graphs import Recorder


@contextlib.contextmanager
def installed() -> Iterator[Recorder]:
    """Record the graphs of engines that start in this context; they must end in it too."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", recorder.make_graph)
        patch.setattr(torch.cuda, "graph", recorder.capture)
        patch.setattr(torch.cuda, "is_current_stream_capturing", recorder.is_capturing)
        patch.setattr(
            GridExecutor,
            "__call__",
            lambda self, *args, **kwargs: recorder.launch(self, *args, **kwargs),
        )
        _replace_platform(patch)
        _replace_worker(patch)
        # What it chose for an engine before would be chosen here, and what it chooses here later.
        selector._cached_get_attn_backend.cache_clear()
        try:
            yield recorder
        finally:
            selector._cached_get_attn_backend.cache_clear()
            workspace.reset_workspace_manager()


def _replace_platform(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU have graphs, and TRITON_ATTN in layers without a window."""
    platform = type(current_platform)
    update = platform.check_and_update_config

    def check_and_update_config(self: Any, vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        sizes = config.cudagraph_capture_sizes
        update(vllm_config)
        config.cudagraph_capture_sizes = sizes

    answers = {
        "support_static_graph_mode": True,
        "get_global_graph_pool": None,
        # As an operator, which is Python, attention would hide its kernels from the graph.
        "opaque_attention_op": False,
        "get_attn_backend_cls": AttentionBackendEnum.TRITON_ATTN.get_path(),
        "num_compute_units": 2,
    }
    for name, answer in answers.items():
        patch.setattr(platform, name, lambda self, *_, _answer=answer, **__: _answer)
    patch.setattr(platform, "check_and_update_config", check_and_update_config)
    # TRITON_ATTN asks for it.
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def _replace_worker(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU's worker do what the GPU's does about workspace and graphs."""
    # Importing the CPU's worker changes torch.cuda for good, as every engine on a CPU does.
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils, warmup

    warm_up, make = CPUWorker.compile_or_warm_up_model, CPUModelRunner.__init__

    def init(self: Any, vllm_config: Any, device: torch.device) -> None:
        workspace.init_workspace_manager(device)
        make(self, vllm_config, device)

    def compile_or_warm_up_model(self: Any) -> Any:
        times = warm_up(self)
        if not self.model_config.enforce_eager:
            self.model_runner.capture_model()
        return times

    patch.setattr(CPUModelRunner, "__init__", init)
    patch.setattr(CPUWorker, "compile_or_warm_up_model", compile_or_warm_up_model)
    # It samples by top-k and top-p, which the interpreter cannot.
    patch.setattr(warmup, "warmup_kernels", lambda *_: None)
    # These ask for streams and pools.
    patch.setattr(cudagraph_utils, "graph_capture", lambda device: contextlib.nullcontext())
    patch.setattr(cudagraph_utils, "capture_pool", lambda *_: contextlib.nullcontext())
