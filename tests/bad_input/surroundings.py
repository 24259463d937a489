"""Environments, versions, other plugins and clusters in which windows are not served."""

import importlib.metadata
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from vllm import envs, plugins
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
        config = EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config()
        if not versions.is_allowed_version(version):  # then a guard is registered
            stock = type("Stock", (), {})
            refusing_windows(stock, versions.untested_reason())(vllm_config=config)  # type: ignore[arg-type, call-arg]

    return situation


def _checked(value: str | None) -> Situation:
    """What ``swa check`` finds first, with this value of ``VLLM_PLUGINS``."""

    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        _set(monkeypatch, VLLM_PLUGINS=value)
        try:
            steps.inspect_plugin()
        except steps.ProblemError as problem:
            raise steps.ProblemError(f"{problem}; {problem.remedy}", "") from problem

    return situation


def _set(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    envs.disable_envs_cache()
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def _batch_invariant(value: str | None, **options: Any) -> Situation:
    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        _set(monkeypatch, VLLM_BATCH_INVARIANT=value)
        arguments = EngineArgs(
            str(model), skip_tokenizer_init=True, additional_config={"swa": options}
        )
        arguments.create_engine_config()

    return situation


def take_the_slot() -> None:
    """The entry point of another plugin."""
    register_backend(AttentionBackendEnum.CUSTOM, "other_plugin.Backend")


def _two_plugins(names: str | None) -> Situation:
    """Another plugin is installed, and vLLM loads those that ``VLLM_PLUGINS`` names."""
    found = importlib.metadata.entry_points
    installed = [
        EntryPoint("other", f"{__name__}:take_the_slot", plugins.DEFAULT_PLUGINS_GROUP),
        EntryPoint("swa", "swa_vllm:register", plugins.DEFAULT_PLUGINS_GROUP),
    ]

    def points(**what: Any) -> Any:
        return installed if what == {"group": plugins.DEFAULT_PLUGINS_GROUP} else found(**what)

    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        _set(monkeypatch, VLLM_PLUGINS=names)
        monkeypatch.setattr(importlib.metadata, "entry_points", points)
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        AttentionBackendEnum.CUSTOM.clear_override()
        plugins.load_general_plugins()
        EngineArgs(str(model), skip_tokenizer_init=True).create_engine_config()

    return situation


def _ray(variables: dict[str, str | None], **arguments: Any) -> Situation:
    def situation(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        _set(monkeypatch, **variables)
        config_on_ray(model, **arguments)

    return situation


def _node(**what: Any) -> Situation:
    here = Installation(__version__)
    nodes = {"10.0.0.1 (a)": here, "10.0.0.2 (b)": Installation(**what)}
    return lambda monkeypatch, model: check_installations(here, nodes)


def _config(name: str, given: Situation, got: str, allowed: str, do: str, *remedies: Any) -> Bad:
    return Bad(name, given, got, allowed, do, ValidationError, SWAConfigError, remedies)


_NEEDED = f"every Ray worker needs swa-backend {__version__}"
_OVER_RAY: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "data_parallel_size": 2,
    "data_parallel_backend": "ray",
    "data_parallel_address": "127.0.0.1",
}

# Each remedy is a situation, in which the model is served.
_RAY_V2 = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
# vLLM 0.33 has a single executor for Ray, and no variable that selects it.
_FORMER_EXECUTOR = [
    _config(
        "former Ray executor",
        _ray({_RAY_V2: "0"}),
        "RayDistributedExecutor",
        "was not tested with windows",
        f"unset {_RAY_V2}",
        _ray({_RAY_V2: None}),
    )
]
SURROUNDINGS = [
    *(
        Bad(
            f"vLLM {version}",
            _version(version),
            f"this is {version}",
            "vLLM 0.32 and 0.33",
            do,
            RuntimeError,
            remedies=(_version("0.32.0"), _version("0.33.0"), _version(version, "1")),
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
        remedies=(_version("0.32.0", "yes"), _version("0.99.0", "1")),
    ),
    *(
        Bad(
            f"VLLM_PLUGINS={value!r}",
            _checked(value),
            f"VLLM_PLUGINS={value!r}",
            "leaves the plugin 'swa' out",
            "unset VLLM_PLUGINS, or add swa",
            steps.ProblemError,
            remedies=(_checked(None), _checked(",".join(filter(None, (value, "swa"))))),
        )
        for value in ("", "other", "SWA")
    ),
    Bad(
        "another plugin's attention backend",
        _two_plugins(None),
        "is taken by other_plugin.Backend",
        "swa_vllm.attention.cpu.backend.SWACPUBackend",
        "set VLLM_PLUGINS to the names of those you want",
        RuntimeError,
        remedies=(_two_plugins("swa"),),
    ),
    _config(
        "batch invariance",
        _batch_invariant("1"),
        "VLLM_BATCH_INVARIANT=1 is set",
        "attention of windowed layers is not batch invariant",
        "unset VLLM_BATCH_INVARIANT, or remove the window",
        _batch_invariant(None),
        _batch_invariant("1", enabled=False),
    ),
    _config(
        "pipeline over Ray",
        _ray({}, tensor_parallel_size=1, pipeline_parallel_size=2),
        "pipeline_parallel_size=2",
        "fails in vLLM's CPU build",
        "Leave it at 1",
        _ray({}, tensor_parallel_size=2, pipeline_parallel_size=1),
        _ray(
            {},
            tensor_parallel_size=1,
            pipeline_parallel_size=2,
            additional_config={"swa": {"enabled": False}},
        ),
    ),
    *(_FORMER_EXECUTOR if _RAY_V2 in envs.environment_variables else ()),
    _config(
        "data parallel over Ray with other workers",
        _ray({}, **_OVER_RAY, distributed_executor_backend="mp"),
        "--distributed-executor-backend mp",
        "starts workers on nodes that nobody asked",
        "leave that argument out",
        _ray({}, **_OVER_RAY, distributed_executor_backend=None),
    ),
    *(
        Bad(
            name,
            _node(**what),
            got,
            _NEEDED,
            do,
            SWAConfigError,
            remedies=(_node(version=__version__),),
        )
        for name, what, got, do in (
            ("node without it", {"version": None}, "(b) has no", "pip install"),
            (
                "node of 0.0.9",
                {"version": "0.0.9"},
                "(b) has swa-backend 0.0.9",
                "pip install",
            ),
            (
                "node that leaves it out",
                {"version": __version__, "left_out_by": "other"},
                "(b) has it, but VLLM_PLUGINS='other'",
                "see that VLLM_PLUGINS is unset or names swa",
            ),
        )
    ),
]
