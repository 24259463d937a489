"""The steps of ``swa check``: each returns what it finds, or raises what is wrong."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import swa_backend
from swa_vllm.tools.check.problems import ProblemError, problem_of_message
from swa_vllm.tools.common.arguments import error_text


def _inspect_distribution(*names: str) -> str | None:
    """Name the first of the distributions that is installed, with its version."""
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def inspect_vllm() -> str:
    """Check that vLLM is installed in a tested version; names it and what it runs on."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        if error.name != "vllm":
            raise ProblemError(
                f"importing vLLM fails: {error}", "install vLLM again, with what it requires"
            ) from error
        raise ProblemError(
            "not installed",
            "with a GPU: pip install 'swa-backend[gpu]'; without one: bash examples/setup_env.sh",
        ) from error
    from swa_vllm.compat import versions

    here = versions.vllm_version()
    if not versions.is_allowed_version(here):
        tested = " and ".join(versions.TESTED_VERSIONS)
        raise ProblemError(
            f"{here}, and this plugin was tested with {tested}",
            f"install one of those, or {versions.untested_remedy()}",
        )
    names = (("torch",), ("triton", "pytorch-triton-rocm"), ("transformers",))
    others = [found for name in names if (found := _inspect_distribution(*name))]
    return ", ".join([here, f"Python {platform.python_version()}", *others])


def inspect_plugin() -> str:
    """Check that vLLM finds this plugin and loads it."""
    from vllm.plugins import load_general_plugins

    from swa_vllm.distributed.nodes import DISTRIBUTION, installation_here

    found = installation_here()
    if found.version is None:
        raise ProblemError(
            f"vLLM finds no plugin of {DISTRIBUTION}, though its packages can be imported",
            "install it into this environment (pip install .); a path to its sources is not enough",
        )
    if found.left_out_by is not None:
        raise ProblemError(
            f"VLLM_PLUGINS={found.left_out_by!r} leaves the plugin 'swa' out",
            "unset VLLM_PLUGINS, or add swa to its names",
        )
    if found.version != swa_backend.__version__:
        raise ProblemError(
            f"{DISTRIBUTION} {found.version} is installed, but {swa_backend.__version__} is "
            f"imported, from {swa_backend.__path__[0]}",
            "install it again (pip install .), and see that PYTHONPATH names no other copy",
        )
    load_general_plugins()
    return f"{DISTRIBUTION} {found.version}, loaded by vLLM"


def inspect_model_classes() -> str:
    """Check that vLLM's registry resolves to this plugin's models."""
    from vllm import ModelRegistry

    from swa_vllm.compat import architectures, versions

    for architecture, path in architectures.MODELS.items():
        owner = architectures.registered_class(architecture)
        if owner in (path, None):  # vLLM itself lacks some in some versions
            continue
        if owner == architectures.GUARDS[architecture]:
            raise ProblemError("windows are refused for all models", versions.untested_reason())
        if str(owner).startswith("swa_vllm.models.guard:"):
            # Another plugin came first, and ours has put a class around its model.
            base = ModelRegistry.models[architecture].load_model_cls().__bases__[0]
            owner = f"{base.__module__}:{base.__qualname__}"
        raise ProblemError(
            f"vLLM resolves {architecture} to {owner}, not to {path}",
            "load only one of the two plugins: set VLLM_PLUGINS to the names of those you want",
        )
    for architecture in architectures.PLAIN:
        try:
            ModelRegistry.models[architecture].load_model_cls()
        except Exception as error:  # an import may fail in any way
            raise ProblemError(
                f"{architecture} cannot be imported: {error!r}",
                "install vLLM and this package again, in versions that fit",
            ) from error
    return f"{len(architectures.MODELS)} architectures resolve to this plugin's classes"


def inspect_backend_slot() -> str:
    """Check that vLLM's slot for a custom attention backend holds this plugin's."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from swa_vllm.compat.backend_slot import check_backend_slot

    try:
        check_backend_slot()
    except RuntimeError as error:
        detail, _, remedy = str(error).partition(". ")
        raise ProblemError(detail, remedy) from error
    return f"slot CUSTOM holds {AttentionBackendEnum.CUSTOM.get_path()}"


def inspect_page_manager() -> str:
    """Check that this plugin's managers have the pages of windowed layers, and of phases."""
    import torch
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from swa_vllm.config.storage import StoragePolicy
    from swa_vllm.kv_cache.manager import SWAManager
    from swa_vllm.kv_cache.prompt_cache import PromptCacheManager, PromptCacheSpec
    from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
    from swa_vllm.kv_cache.spec import SWASpec

    shape: dict[str, Any] = {
        "block_size": 16,
        "num_kv_heads": 1,
        "head_size": 64,
        "dtype": torch.bfloat16,
    }
    windowed = SWASpec(**shape, sliding_window=64, storage=StoragePolicy())
    wanted: dict[KVCacheSpec, type[SingleTypeKVCacheManager]] = {
        windowed: SWAManager,
        PromptCacheSpec(**shape): PromptCacheManager,
        PromptWindowSpec(**shape, window=64): PromptWindowManager,
    }
    for spec, manager in wanted.items():
        found = KVCacheSpecRegistry.get_manager_class(spec)
        if found is not manager:
            raise ProblemError(
                f"vLLM manages {type(spec).__name__} with {found}, not with {manager.__name__}",
                "another plugin replaced it: set VLLM_PLUGINS to the names of those you want",
            )
    managed = (f"{type(spec).__name__} by {manager.__name__}" for spec, manager in wanted.items())
    return f"vLLM manages {', '.join(managed)}"


def inspect_model(model: str, arguments: dict[str, Any]) -> str:
    """Check that vLLM would serve a model; returns the table that its start-up would log.

    Args:
        arguments: more arguments of vLLM's engine.
    """
    from swa_vllm.tools.check.inspection import limit_inspection
    from swa_vllm.tools.check.model import inspect_layers

    try:
        with limit_inspection():
            return inspect_layers(model, arguments)
    except (ValueError, RuntimeError) as error:
        raise problem_of_message(error_text(error)) from error
