"""What is refused together with a window, by name and before weights are loaded."""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform

from swa_backend.can_slide import check_can_slide
from swa_backend.kernels.device import target_of
from swa_backend.kernels.plans import Target
from swa_backend.layers import SLIDING
from swa_backend.options import PrefillPages, SWAConfigError, is_section
from swa_backend.weights import check_weights
from swa_backend.window import Phase
from swa_vllm.compat import envs
from swa_vllm.compat.architectures import (
    MODELS,
    PLAIN,
    WINDOWED,
    has_windows,
    phase_refused,
    registered_class,
)
from swa_vllm.compat.backend_slot import LOAD_ONE, check_backend_slot
from swa_vllm.compat.cache_dtypes import FP8, UNQUANTIZED, sinks_refused_on_cpus
from swa_vllm.compat.connectors import NIXL, NIXL_PATH, why_refused
from swa_vllm.compat.kv_groups import split_into_kv_groups
from swa_vllm.compat.prompt_lens import RSWA_BACKENDS
from swa_vllm.config.cache_dtype import checkpoints_cache_dtype, resolved_cache_dtype
from swa_vllm.config.implementation import obstacle_to_survivors
from swa_vllm.config.swa_config import (
    SWAConfig,
    is_draft,
    text_config_of,
    vllm_text_config,
    wants_windows_decided,
)

NGRAM, DRAFT_MODEL, DFLASH = "ngram", "draft_model", "dflash"
PROVEN_SPECULATION = (NGRAM, "eagle3", DRAFT_MODEL, DFLASH)
PROVEN_WITH_PHASE = (NGRAM, DRAFT_MODEL)
# By EAGLE-3's method, for another text stack or with parallel drafts.
_UNTRIED_DRAFTS = frozenset({"Eagle3Qwen3vlForCausalLM", "PeagleQwen3ForCausalLM"})
# What drafts, by method.
_PROVEN_DRAFTS = {DRAFT_MODEL: "Qwen3ForCausalLM", DFLASH: "DFlashDraftModel"}


def check_servable(
    vllm_config: VllmConfig, swa: SWAConfig, model_config: ModelConfig | None = None
) -> None:
    """Raise SWAConfigError for a model or an engine whose windows would not be exact.

    Args:
        swa: what was decided for the model.
        model_config: of a draft model beside the engine's own; None for that one.

    Raises:
        RuntimeError: another plugin holds the attention backend slot.
    """
    if sys.platform != "linux":
        raise SWAConfigError(
            f"sliding windows are served on Linux only, this is {sys.platform}; serve there, or "
            "remove the window"
        )
    check_backend_slot()
    check_can_slide(text_config_of(model_config or vllm_config.model_config))
    _refuse_engine(vllm_config)
    if swa.layers.linear:
        _refuse_beside_states(vllm_config, swa)
    if vllm_config.kv_transfer_config is not None:
        _refuse_transfer(vllm_config, swa, vllm_config.kv_transfer_config)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        _refuse_stages(vllm_config, len(swa.layers.windows))
    if swa.frees_pages and swa.options.phase is Phase.BOTH:
        _refuse_events(vllm_config)
    if swa.has_own_backend:
        _refuse_cache_dtype(vllm_config, swa)
    if swa.uses_kernels:
        _refuse_kernels(vllm_config)
    if swa.options.prefill_pages is PrefillPages.SURVIVORS:
        _refuse_survivors(vllm_config, swa)
    if swa.options.sink_tokens:
        _refuse_sinks(vllm_config, swa)
    if swa.options.phase is not Phase.BOTH:
        _refuse_phase(vllm_config, swa)
    if swa.options.debug_poison:
        _refuse_poison(vllm_config, swa)


def refuse_unserved(vllm_config: VllmConfig) -> None:
    """Refuse options of windows for a model whose layers this plugin does not window.

    Not for a draft model: the options are those of its target.
    """
    additional, model = vllm_config.additional_config, vllm_config.model_config
    if is_draft(model) or not isinstance(additional, Mapping):
        return
    asked = [key for key in additional if is_section(key) and additional[key] != {}]
    if not asked:
        return
    served = [name for name in model.architectures if has_windows(name)]
    if served:  # and replaced by --model-impl
        raise SWAConfigError(
            f"--additional-config has {asked[0]!r}, and --model-impl {model.model_impl} serves "
            f"{served[0]} as vLLM's {model.architecture}, which ignores it. Leave --model-impl "
            f"out, or remove {asked[0]!r}"
        )
    raise SWAConfigError(
        f"--additional-config has {asked[0]!r}, and {model.architecture} is not served with "
        f"windows, only {', '.join((*PLAIN, *WINDOWED))}. Serve one of these, or remove "
        f"{asked[0]!r}"
    )


def refuse_foreign_model(vllm_config: VllmConfig) -> None:
    """Raise RuntimeError for windows in a model that another plugin registered after this one."""
    architecture = vllm_config.model_config.architecture
    owner = registered_class(architecture)
    if owner is None or owner.startswith("swa_vllm."):  # our models, and guards of others'
        return
    if wants_windows_decided(vllm_config):
        raise RuntimeError(why_foreign(architecture, owner))


def why_foreign(architecture: str, owner: str) -> str:
    """Say why a model of another plugin has no windows, and what to do."""
    return (
        f"{architecture} is registered by {owner}, and a window needs {MODELS[architecture]}. "
        f"{LOAD_ONE}"
    )


def refuse_drafts(vllm_config: VllmConfig, target: SWAConfig, draft: SWAConfig | None) -> None:
    """Refuse a model that drafts, where that was not tested with windows of either model's.

    Args:
        target: what was decided for the engine's own model.
        draft: what was decided for its draft model; None where another method drafts.
    """
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method not in _PROVEN_DRAFTS:
        return
    proven, architecture = _PROVEN_DRAFTS[speculation.method], vllm_config.model_config.architecture
    drafting = ", ".join(speculation.draft_model_config.architectures)
    obstacles = {
        f"the draft {drafting}, only with {proven}": drafting != proven,
        f"the target {architecture}, only with {', '.join(PLAIN)}": architecture not in PLAIN,
        "parallel_drafting": draft is not None and speculation.parallel_drafting,
        "use_heterogeneous_vocab": speculation.use_heterogeneous_vocab,
        "a kv_cache_dtype of the draft's own": speculation.kv_cache_dtype is not None,
        "--disable-hybrid-kv-cache-manager": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
    }
    if found := [what for what, is_there in obstacles.items() if is_there]:
        raise SWAConfigError(
            f"speculative decoding by {speculation.method} was not tested with windows and "
            f"{found[0]}; change that, or remove the window"
        )
    if not vllm_config.use_v2_model_runner:
        if draft is None:
            _refuse_dflash_with_v1(vllm_config, target)
        else:
            _refuse_draft_model_with_v1(vllm_config, target, draft)


def refuse_draft_of_others(vllm_config: VllmConfig) -> None:
    """Refuse a draft model with a window of its own beside a target that is no Qwen3.

    Args:
        vllm_config: the config that vLLM makes for the draft.
    """
    speculation = vllm_config.speculative_config
    if speculation is None or not SWAConfig.from_vllm(vllm_config).slides:
        return
    target = speculation.target_model_config.architecture
    if target not in PLAIN:
        raise SWAConfigError(
            f"the draft model {vllm_config.model_config.model} has a window by its config.json, "
            f"which was not tested beside {target}, only beside {', '.join(PLAIN)}. Set "
            "use_sliding_window to false there, or serve one of these"
        )


def _refuse_draft_model_with_v1(
    vllm_config: VllmConfig, target: SWAConfig, draft: SWAConfig
) -> None:
    """Refuse several KV groups, of which V1 gives a draft model the pages of the first."""
    kinds = {*target.layers.windows, *draft.layers.windows}
    options = target.options
    if (
        len(kinds) == 1
        and not options.sink_tokens
        and options.phase is Phase.BOTH
        and _drafts_with_equal_pages(vllm_config)
    ):
        return
    shown = ", ".join(sorted("full" if window is None else str(window) for window in kinds))
    raise SWAConfigError(
        "Model Runner V1 gives a draft model the pages of the first KV group, where its layers are "
        "only if all layers of both models have one window, KV heads of one number and size, no "
        f"sink tokens and no phase; windows here are {shown}. Use Model Runner V2 "
        "(VLLM_USE_V2_MODEL_RUNNER=1; needs Triton), give both models one window (the draft's is "
        "in its config.json), or use another method"
    )


def _refuse_dflash_with_v1(vllm_config: VllmConfig, target: SWAConfig) -> None:
    """Refuse KV groups that are smaller than the draft, whose layers V1 needs in one of them."""
    speculation = vllm_config.speculative_config
    assert speculation is not None
    config = text_config_of(speculation.draft_model_config)
    kinds = Counter[object](target.layers.windows)
    slides = SLIDING in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "dflash_config", None) or {}
    ).get("use_swa")
    kind = "draft" if slides or not _drafts_with_equal_pages(vllm_config) else None
    kinds[kind] += config.num_hidden_layers
    size, num_groups = split_into_kv_groups(list(kinds.values()))
    if dict(zip(kinds, num_groups, strict=True))[kind] > 1:
        raise SWAConfigError(
            "Model Runner V1 needs all layers of a DFlash draft in one KV group, and vLLM makes "
            f"groups of {size} layers here, for {kinds[kind]} of the draft's kind. Use Model "
            "Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1; needs Triton), or let more or fewer of the "
            "target's layers slide (full_attention_layers)"
        )


def _drafts_with_equal_pages(vllm_config: VllmConfig) -> bool:
    speculation, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    assert speculation is not None
    models = vllm_config.model_config, speculation.draft_model_config
    sizes = {(model.get_num_kv_heads(parallel), model.get_head_size()) for model in models}
    return len(sizes) == 1


def refuse_wrong_weights(vllm_config: VllmConfig, model_config: ModelConfig | None = None) -> None:
    """Raise ValueError for a local checkpoint whose files are not what its config says.

    Args:
        model_config: of a draft model beside the engine's own; None for that one.
    """
    model_config = model_config or vllm_config.model_config
    directory = Path(model_config.model)
    if directory.is_dir() and vllm_config.load_config.load_format in ("auto", "safetensors"):
        check_weights(directory, text_config_of(model_config))


def refuse_stages_on_cpus(vllm_config: VllmConfig) -> None:
    """Refuse pipeline stages where vLLM fails with them, with a window and without.

    Of the whole engine's config, and so not asked again by the model in a worker.
    """
    size = vllm_config.parallel_config.pipeline_parallel_size
    if size > 1 and current_platform.is_cpu():
        raise SWAConfigError(
            f"pipeline_parallel_size={size} fails in vLLM's CPU build, with a window and without: "
            "it makes no buffer for what a stage gets from the one before it. Leave it at 1 (use "
            "tensor parallelism), or serve on GPUs"
        )


def refuse_windows_in_part(vllm_config: VllmConfig, prefix: str) -> None:
    """Refuse windows in a Qwen3 that is the part ``prefix`` of a model, or drafts for one."""
    if wants_windows_decided(vllm_config):
        raise SWAConfigError(
            f"the Qwen3 that is the part {prefix!r} of this model or engine was not tested with "
            "windows; remove the window from the options and from the checkpoint of that part"
        )


def _refuse_survivors(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    obstacle = obstacle_to_survivors(swa.implementation, vllm_config)
    if obstacle is not None:
        raise SWAConfigError(
            f'swa.prefill_pages="survivors" cannot be had: {obstacle}. '
            'Use "auto" or "all", or remove what is named here'
        )


def _refuse_sinks(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    options = swa.options
    remedy = "remove either"
    obstacle = None
    if not swa.has_own_backend:
        obstacle = "this platform, where windowed layers use vLLM's own attention backend"
        remedy = "remove sink_tokens"
    elif vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        obstacle = "--disable-hybrid-kv-cache-manager, which leaves pages to vLLM"
    elif not swa.uses_kernels and (dtype := resolved_cache_dtype(vllm_config)) not in UNQUANTIZED:
        got, flags = _name_refused_dtype(dtype, vllm_config), _flags_for_refused_dtype(vllm_config)
        raise SWAConfigError(sinks_refused_on_cpus(got, "swa.sink_tokens", flags))
    elif options.position_shift and _has_positions_of_several_kinds(vllm_text_config(vllm_config)):
        obstacle = "position_shift in a model whose RoPE has positions in time and space"
        remedy = "remove position_shift"
    if obstacle is not None:
        raise SWAConfigError(f"swa.sink_tokens cannot be had with {obstacle}; {remedy}")
    if options.position_shift and not swa.uses_kernels:
        from swa_vllm.attention.cpu.position_shift import wide_head_size  # of the CPU backend alone

        wide_head_size(vllm_config.model_config.get_head_size(), options.sink_tokens)


def _refuse_phase(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    asked = f'swa.phase="{swa.options.phase}"'
    if not swa.has_own_backend:
        raise SWAConfigError(
            f"{asked} needs this plugin's attention backend, which this platform does not use; "
            "remove phase"
        )
    if refusal := phase_refused(asked, [vllm_config.model_config.architecture]):
        raise SWAConfigError(refusal)
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in PROVEN_WITH_PHASE:
        raise SWAConfigError(
            f"{asked} was not tested with speculative decoding by {speculation.method}; use "
            f"{' or '.join(PROVEN_WITH_PHASE)}, or remove either"
        )
    _refuse_backends_beside_phase(asked, vllm_config)
    if swa.options.phase is Phase.DECODE:
        _refuse_window_of_answers(asked, vllm_config, swa)


def _refuse_backends_beside_phase(asked: str, vllm_config: VllmConfig) -> None:
    attention = vllm_config.attention_config
    backends = attention.backend, *attention.backend_per_kind.values()
    chosen = {backend.name for backend in backends if backend is not None}
    if "CUSTOM" in chosen:
        raise SWAConfigError(
            f"{asked} needs another backend in full layers than in sliding ones, and "
            "--attention-backend CUSTOM gives them this plugin's; leave it out"
        )
    # On a CPU the flag has no effect.
    by_v1 = not vllm_config.use_v2_model_runner and not current_platform.is_cpu()
    if by_v1 and (unknown := sorted(chosen - set(RSWA_BACKENDS))):
        raise SWAConfigError(
            f"{asked} cannot be had with --attention-backend {unknown[0]} and Model Runner V1, "
            f"which gives lengths of prompts to {', '.join(RSWA_BACKENDS)} only; use one of these, "
            "or leave it out"
        )


def _refuse_window_of_answers(asked: str, vllm_config: VllmConfig, swa: SWAConfig) -> None:
    if vllm_config.model_config.runner_type == "pooling":
        raise SWAConfigError(
            f"{asked} would have no effect: a pooling model generates no tokens. Remove phase, or "
            "the window"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise SWAConfigError(
            f"{asked} frees pages, and --disable-hybrid-kv-cache-manager leaves pages to vLLM; "
            "remove either"
        )
    if not swa.uses_kernels and (dtype := resolved_cache_dtype(vllm_config)) not in UNQUANTIZED:
        got, flags = _name_refused_dtype(dtype, vllm_config), _flags_for_refused_dtype(vllm_config)
        raise SWAConfigError(sinks_refused_on_cpus(got, asked, flags))


def _refuse_poison(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    if not swa.has_own_backend:
        raise SWAConfigError(
            "swa.debug_poison needs this plugin's attention backend, which this platform does "
            "not use; remove debug_poison"
        )
    executor = vllm_config.parallel_config.distributed_executor_backend
    if executor not in (None, "uni") or multiprocessing.parent_process() is not None:
        raise SWAConfigError(
            "swa.debug_poison works only with scheduler and worker in the main process: use "
            "LLM(...) with VLLM_ENABLE_V1_MULTIPROCESSING=0 and one worker, or remove debug_poison"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise SWAConfigError(
            "swa.debug_poison cannot be had with --disable-hybrid-kv-cache-manager; remove either"
        )


def _refuse_cache_dtype(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    dtype = resolved_cache_dtype(vllm_config)
    if dtype not in UNQUANTIZED and dtype not in FP8:
        who = "the kernels of windowed layers" if swa.uses_kernels else "windowed layers on CPUs"
        got, flags = _name_refused_dtype(dtype, vllm_config), _flags_for_refused_dtype(vllm_config)
        raise SWAConfigError(
            f"{got} is unknown to {who}; use {flags} or one of {', '.join(FP8)}, or remove the "
            "window"
        )


def _refuse_kernels(vllm_config: VllmConfig) -> None:
    remedy = "remove the window"
    dtype = resolved_cache_dtype(vllm_config)
    if dtype in FP8 and current_platform.is_fp8_fnuz():
        got, flags = _name_refused_dtype(dtype, vllm_config), _flags_for_refused_dtype(vllm_config)
        raise SWAConfigError(
            f"{got}: this device's fp8 (fnuz) is unknown to the kernels of windowed layers; "
            f"use {flags}, or {remedy}"
        )
    try:
        _refuse_device()
    except ValueError as error:
        raise SWAConfigError(
            f"the Triton kernels of windowed layers do not run here ({error}). On a CPU set "
            'TRITON_INTERPRET=1 before the engine starts (slow, for debugging) or swa.impl="auto"; '
            f"on a GPU that is too old {remedy}"
        ) from error


def _name_refused_dtype(dtype: str, vllm_config: VllmConfig) -> str:
    """Name the KV cache's dtype, and the checkpoint if that asks for it."""
    by_checkpoint = dtype == checkpoints_cache_dtype(vllm_config)
    return f"kv_cache_dtype={dtype}" + (" (the checkpoint asks for it)" if by_checkpoint else "")


def _flags_for_refused_dtype(vllm_config: VllmConfig) -> str:
    """Give the flags of a KV cache in the model's dtype, whatever the checkpoint asks for."""
    if checkpoints_cache_dtype(vllm_config) == "auto":
        return "--kv-cache-dtype auto"
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype == "float32":  # which no value of the flag names
        return "--dtype bfloat16 --kv-cache-dtype bfloat16"
    return f"--kv-cache-dtype {dtype}"


def _refuse_device() -> None:
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is not None:
        Target("cuda", capability.to_int(), num_processors=1)
    elif not current_platform.is_cuda_alike():
        target_of(torch.device(current_platform.device_type))


def _refuse_events(vllm_config: VllmConfig) -> None:
    events = vllm_config.kv_events_config
    if (
        events is not None
        and events.enable_kv_cache_events
        and vllm_config.cache_config.enable_prefix_caching
    ):
        raise SWAConfigError(
            "--kv-events-config would mislead a router: of sliding layers vLLM announces pages "
            "that are not in the prefix cache, and pages after others that never were. Remove it, "
            "or the window"
        )


def _refuse_beside_states(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    """Refuse what was not tried in a model that has layers with linear attention."""
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    obstacles = {
        f"speculative decoding by {speculation.method}" if speculation is not None else "": (
            speculation is not None
        ),
        "swa.position_shift": swa.options.position_shift,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--disable-hybrid-kv-cache-manager": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}": (
            parallel.pipeline_parallel_size > 1
        ),
    }
    if found := [what for what, is_there in obstacles.items() if is_there]:
        raise SWAConfigError(
            f"{found[0]} was not tested with windows in {vllm_config.model_config.architecture}, "
            "which has layers with linear attention; remove either"
        )


def _refuse_transfer(vllm_config: VllmConfig, swa: SWAConfig, transfer: KVTransferConfig) -> None:
    name = transfer.kv_connector
    if name != NIXL:
        raise SWAConfigError(
            f"the KV connector {name} (--kv-transfer-config) {why_refused(name)}; use {NIXL}, or "
            "remove it or the window"
        )
    if transfer.kv_connector_module_path not in (None, NIXL_PATH):
        raise SWAConfigError(
            f"kv_connector_module_path={transfer.kv_connector_module_path}: with windows {NIXL} is "
            "this plugin's; leave it out"
        )
    speculation = vllm_config.speculative_config
    options = swa.options
    obstacles = {
        f"swa.sink_tokens={options.sink_tokens}, which vLLM would not send": options.sink_tokens,
        f'swa.phase="{options.phase}", which was not tried': options.phase is not Phase.BOTH,
        "--disable-hybrid-kv-cache-manager, which leaves pages to vLLM": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "pipeline stages, which vLLM does not serve with it": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "speculative decoding, which was not tried": speculation is not None,
        "bidirectional_kv_xfer, which was not tried": (
            transfer.get_from_extra_config("bidirectional_kv_xfer", False)
        ),
        f"kv_buffer_device={transfer.kv_buffer_device} on this platform, which was not tried": (
            transfer.kv_buffer_device != current_platform.device_type
        ),
        "swa.debug_poison, which would overwrite the pages that arrive": (
            options.debug_poison and transfer.is_kv_consumer
        ),
        "enforce_handshake_compat=false, by which it would take pages of another window": (
            not transfer.get_from_extra_config("enforce_handshake_compat", True)
        ),
    }
    if found := [what for what, is_there in obstacles.items() if is_there]:
        raise SWAConfigError(f"{NIXL} cannot be had with {found[0]}; remove either")
    package = "nixl_rocm" if current_platform.is_rocm() else "nixl"
    if find_spec(package) is None:
        raise SWAConfigError(
            f"{NIXL} needs the package {package}, which is not installed; pip install {package} "
            "here and where workers run, or remove --kv-transfer-config"
        )


def _refuse_stages(vllm_config: VllmConfig, num_layers: int) -> None:
    size = vllm_config.parallel_config.pipeline_parallel_size
    stages = [range(*get_pp_indices(num_layers, rank, size)) for rank in range(size)]
    if idle := [rank for rank, stage in enumerate(stages) if not stage]:
        raise SWAConfigError(
            f"pipeline_parallel_size={size} leaves stage {idle[0]} without any of this model's "
            f"{num_layers} layers; give fewer stages, or unset VLLM_PP_LAYER_PARTITION"
        )
    speculation = vllm_config.speculative_config
    if speculation is not None:
        raise SWAConfigError(
            f"pipeline_parallel_size={size} was not tested with windows and speculative decoding "
            f"by {speculation.method}; leave it at 1, or remove either"
        )


def _has_positions_of_several_kinds(config: object) -> bool:
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def _refuse_engine(vllm_config: VllmConfig) -> None:
    if envs.is_batch_invariant():
        raise SWAConfigError(
            "VLLM_BATCH_INVARIANT=1 is set, but attention of windowed layers is not batch "
            "invariant: how a window is divided depends on how many requests decode; unset "
            "VLLM_BATCH_INVARIANT, or remove the window"
        )
    if vllm_config.cache_config.kv_offloading_size is not None:
        raise SWAConfigError(
            "KV cache offloading (--kv-offloading-size) does not start without a GPU and was not "
            "tried with windows; remove it, or the window"
        )
    parallel = vllm_config.parallel_config
    sizes = {
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            raise SWAConfigError(
                f"{name}={size} was not tested with windows; leave it at 1 (use "
                "tensor parallelism or pipeline stages), or remove the window"
            )
    if parallel.use_ubatching:
        raise SWAConfigError(
            "microbatches (--enable-dbo, --ubatch-size) were not tested with windows; leave them "
            "out, or remove the window"
        )
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in PROVEN_SPECULATION:
        raise SWAConfigError(
            f"speculative decoding by {speculation.method} was not tested with windows; allowed "
            f"are {', '.join(PROVEN_SPECULATION)}: use one of these, or remove the window"
        )
    drafting = getattr(getattr(speculation, "draft_model_config", None), "architectures", ())
    if untried := sorted(_UNTRIED_DRAFTS & {*drafting}):
        raise SWAConfigError(
            f"the draft {untried[0]} was not tested with windows; use an Eagle3Qwen3ForCausalLM or "
            "another method, or remove the window"
        )
