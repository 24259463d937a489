"""Pipeline stages on CPUs, where vLLM fails for want of a single buffer: tests make it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from swa_vllm import config_hook
from tests.helpers.engines import start_engine, stop_engine


@contextmanager
def staged_engine(model: Path, **kwargs: Any) -> Iterator[LLM]:
    """An engine of several pipeline stages, whose workers are processes of their own."""
    options = kwargs.pop("additional_config", {}).get("swa", {})
    with stages_allowed():
        llm = start_engine(
            model,
            distributed_executor_backend="mp",
            # Poison needs the workers in this process.
            additional_config={"swa": {**options, "debug_poison": False}},
            **kwargs,
        )
    try:
        make_stage_buffers(llm.collective_rpc)
        yield llm
    finally:
        llm.llm_engine.model_executor.shutdown()
        del llm
        stop_engine()


@contextmanager
def stages_allowed() -> Iterator[None]:
    """Have this plugin not refuse stages on CPUs, as it does because vLLM fails with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_hook, "refuse_stages_on_cpus", lambda config: None)
        yield


def make_stage_buffers(collective_rpc: Callable[..., Any]) -> Any:
    """Make what vLLM's GPU runner makes while it warms up, for each stage but the first.

    Args:
        collective_rpc: an engine's, whose result is returned; that of an asynchronous engine has to
            be awaited.
    """

    # A function inside a function: its code is sent to the workers.
    def make(worker: Any) -> None:
        runner = worker.model_runner
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    return collective_rpc(make)
