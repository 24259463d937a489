"""Environments, versions, other plugins and clusters in which windows are not served."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from swa_backend import __version__
from swa_backend.options import SWAConfigError
from swa_vllm.compat import versions
from swa_vllm.compat.envs import ALLOW_UNTESTED
from swa_vllm.distributed.nodes import Installation, check_installations
from swa_vllm.models.guard import refusing_windows
from swa_vllm.tools.check import steps
from tests.bad_input.row import Bad
from tests.helpers.ray_cluster import config_on_ray

# Makes what is wrong so, and meets it with a model that slides.
Situation = Callable[[pytest.MonkeyPatch, Path], object]


def _version(version: str, allow: str | None = None) -> Situation:
    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        monkeypatch.setattr(versions, "vllm_version", lambda: version)
        if allow is not None:
            monkeypatch.setenv(ALLOW_UNTESTED, allow)
        stock = type("Stock", (), {})
        config = EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config()
        refusing_windows(stock, versions.untested_reason())(vllm_config=config)  # type: ignore[arg-type, call-arg]

    return situation


def _checked(name: str, value: str) -> Situation:
    """What ``swa check`` finds first."""

    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        monkeypatch.setenv(name, value)
        try:
            steps.inspect_plugin()
        except steps.ProblemError as problem:
            raise steps.ProblemError(f"{problem}; {problem.remedy}", "") from problem

    return situation


def _batch_invariant(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config()


def _slot(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    register_backend(AttentionBackendEnum.CUSTOM, "other_plugin.Backend")
    EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config()


def _ray(variables: dict[str, str], **arguments: Any) -> Situation:
    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        envs.disable_envs_cache()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config_on_ray(model, **arguments)

    return situation


def _node(**what: Any) -> Situation:
    here = Installation(__version__)
    nodes = {"10.0.0.1 (a)": here, "10.0.0.2 (b)": Installation(**what)}
    return lambda monkeypatch, model: check_installations(here, nodes)


def _config(name: str, given: Situation, got: str, allowed: str, do: str) -> Bad:
    return Bad(name, given, got, allowed, do, ValidationError, SWAConfigError)


_NEEDED = f"every Ray worker needs swa-backend {__version__}"
_OVER_RAY: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "data_parallel_size": 2,
    "data_parallel_backend": "ray",
    "data_parallel_address": "127.0.0.1",
    "distributed_executor_backend": "mp",
}

SURROUNDINGS = [
    *(
        Bad(
            f"vLLM {version}",
            _version(version),
            f"this is {version}",
            "vLLM 0.32 and 0.33",
            do,
            RuntimeError,
        )
        for version, do in (
            ("0.31.1", "Install one of those"),
            ("0.99.0", "set SWA_ALLOW_UNTESTED_VLLM=1"),
            ("1.32.0", "Install one of those"),
            ("dev", "Install one of those"),
        )
    ),
    Bad(
        "untested vLLM allowed by another word",
        _version("0.99.0", "yes"),
        "here it is 'yes'",
        "tested with vLLM 0.32 and 0.33",
        "set SWA_ALLOW_UNTESTED_VLLM=1",
        RuntimeError,
    ),
    *(
        Bad(
            f"VLLM_PLUGINS={value!r}",
            _checked("VLLM_PLUGINS", value),
            f"VLLM_PLUGINS={value!r}",
            "leaves the plugin 'swa' out",
            "unset VLLM_PLUGINS, or add swa",
            steps.ProblemError,
        )
        for value in ("", "other", "SWA")
    ),
    Bad(
        "another plugin's attention backend",
        _slot,
        "is taken by other_plugin.Backend",
        "swa_vllm.attention.cpu.backend.SWACPUBackend",
        "set VLLM_PLUGINS to the names of those you want",
        RuntimeError,
    ),
    _config(
        "batch invariance",
        _batch_invariant,
        "VLLM_BATCH_INVARIANT=1 is set",
        "attention of windowed layers is not batch invariant",
        "unset VLLM_BATCH_INVARIANT, or remove the window",
    ),
    _config(
        "pipeline over Ray",
        _ray({}, tensor_parallel_size=1, pipeline_parallel_size=2),
        "pipeline_parallel_size=2",
        "was not tested with windows",
        "leave it at 1",
    ),
    _config(
        "former Ray executor",
        _ray({"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0"}),
        "RayDistributedExecutor",
        "was not tested with windows",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
    ),
    _config(
        "data parallel over Ray with other workers",
        _ray({}, **_OVER_RAY),
        "--distributed-executor-backend mp",
        "starts workers on nodes that nobody asked",
        "leave that argument out",
    ),
    Bad(
        "node without it", _node(version=None), "(b) has no", _NEEDED, "pip install", SWAConfigError
    ),
    Bad(
        "node of 0.0.9",
        _node(version="0.0.9"),
        "(b) has swa-backend 0.0.9",
        _NEEDED,
        "pip install",
        SWAConfigError,
    ),
    Bad(
        "node that leaves it out",
        _node(version=__version__, left_out_by="other"),
        "(b) has it, but VLLM_PLUGINS='other'",
        _NEEDED,
        "see that VLLM_PLUGINS is unset or names swa",
        SWAConfigError,
    ),
]
