"""Fixtures: demo and tiny checkpoints, and in-process engines.

Engines run eager, in fp32 and in this process, so that their tokens are comparable with Hugging
Face's and their managers can be looked at. One engine lives at a time; it is reused by the tests
that follow one another with the same configuration.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read by vLLM and by OpenMP when they are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

import pytest
from vllm import LLM

from engine_tools import start_engine, stop_engine
from make_demo_model import ensure_demo_model
from tiny_models import save_tiny_llama, save_tiny_model

ModelFactory = Callable[..., Path]
EngineFactory = Callable[..., LLM]


@pytest.fixture(scope="session")
def demo_model() -> dict[str, Path]:
    """Real weights: directories of the variants ``full``, ``sliding`` and ``mixed``."""
    return ensure_demo_model(Path(os.environ.get("SWA_DEMO_CACHE", ".cache/demo")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Directory of the random tiny Qwen3 with the given config keys; same weights for all."""
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp("tiny"), **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random tiny Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineFactory]:
    """The engine of a checkpoint and ``LLM`` arguments; it replaces the one before."""
    alive: dict[str, LLM] = {}

    def start(model: Path, **kwargs: Any) -> LLM:
        key = repr((model, sorted(kwargs.items())))
        if key not in alive:
            alive.clear()
            stop_engine()
            alive[key] = start_engine(model, **kwargs)
        return alive[key]

    yield start
    alive.clear()
    stop_engine()
