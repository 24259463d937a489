"""Options, config files and engines that cannot be served, and what is said before weights."""

import math
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from swa_backend.options import SWAConfigError
from tests.bad_input.row import Bad
from tests.helpers.quantized_models import FP8_CACHE
from tests.helpers.tiny_models import BY_LAYER_TYPES, FULL, MIXED, MOE, ROPE, SLIDING

LAYERS = "swa.full_attention_layers"


# A value of each option that is right beside a window of 8.
_RIGHT: dict[str, Any] = {
    "enabled": True,
    "window": 8,
    "phase": "prefill",
    "sink_tokens": 4,
    "position_shift": False,
    "full_attention_layers": "0",
    "prefill_pages": "auto",
    "impl": "auto",
    "debug_poison": False,
}


def _refused(name: str, given: Any, got: str, allowed: str, do: str, *remedies: Any) -> Bad:
    return Bad(name, given, got, allowed, do, ValidationError, SWAConfigError, remedies)


def _option(
    given: dict[str, Any], got: str, allowed: str, do: str, *remedies: dict[str, Any]
) -> Bad:
    """Of the ``swa`` object, with a window unless it is about that.

    What is unknown is to be removed, and of what is known to be given a right value, unless
    ``remedies`` say something else.
    """
    options = given if "window" in given else {"window": 8, **given}
    shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
    right = {
        key: _RIGHT[key] if key in given else value
        for key, value in options.items()
        if key in _RIGHT
    }
    fixed = [{"swa": remedy} for remedy in remedies or (right,)]
    return _refused(shown, {"swa": options}, got, allowed, do, *fixed)


def _tokens(key: str, value: Any, least: int) -> Bad:
    allowed = f"must be an integer >= {least} and below 2**31 (tokens"
    return _option({key: value}, f"got {value!r}", allowed, f"swa.{key}")


def _spec(spec: Any, got: str, allowed: str, do: str) -> Bad:
    right = "0-2" if spec == "0-3" else "every:4" if spec == "every:5" else "0"
    return _option(
        {"full_attention_layers": spec},
        got,
        allowed,
        do,
        {"window": 8, "full_attention_layers": right},
    )


# Of --additional-config, for a full-attention checkpoint of four layers.
OPTIONS = [
    _refused(
        "swa is null", {"swa": None}, "got None", "an object with keys from", "Example: --add"
    ),
    _refused("swa is a list", {"swa": ["window"]}, "got ['window']", "keys from", "Example: --add"),
    _refused(
        "swa is a number", {"swa": 64}, "got 64", "keys from enabled, window", "Example: --add"
    ),
    _refused(
        "options outside of swa",
        {"window": 64},
        "has 'window' where",
        'object "swa"',
        "Write --add",
    ),
    _refused("SWA", {"SWA": {"window": 64}}, "has 'SWA' where", 'an object "swa"', "Write --add"),
    _option(
        {"windows": 4},
        "unknown key windows",
        "allowed are enabled, window",
        "mean window?",
        {"window": 4},
    ),
    _option(
        {"Sink_Tokens": 4},
        "key Sink_Tokens",
        "allowed are enabled,",
        "mean sink_tokens?",
        {"window": 8, "sink_tokens": 4},
    ),
    _option({"x": 1}, "unknown key x", "allowed are enabled, window, phase", "allowed are"),
    *(
        _tokens("window", value, 1)
        for value in (0, -1, True, "64", 6.5, 64.0, None, [8], math.nan, math.inf, 2**31, 10**30)
    ),
    _option(
        {"window": {}},
        "an object without layers",
        "layers and their windows",
        "or a number for all",
    ),
    *(
        _option(
            {"window": {"0-1": value}},
            f"got {value!r}",
            "swa.window['0-1'] must be an integer >= 1",
            "swa.window",
        )
        for value in (0, True, "64", None, {"0": 8})
    ),
    *(
        _option({"window": {spec: 8}}, f"swa.window={spec!r}", allowed, do)
        for spec, allowed, do in (
            ("a", '"every:N" (N >= 1)', "write indices and"),
            ("0-4", "this model has layers 0..3", "out of range"),
            ("every:5", "this model's 4 layers", "give a smaller number"),
        )
    ),
    _option({"window": {"none": 8}}, "'none' names no layer", "layers that are not named", "leave"),
    _option(
        {"window": {"0-2": 8, "every:2": 16}},
        "names layer 1 twice",
        "each layer that slides once",
        "as in {",
        {"window": {"0,2": 8, "every:2": 16}},
    ),
    _option(
        {"window": {"0": 8}, "full_attention_layers": "1"},
        "swa.full_attention_layers names layers too",
        "all that window does not name are full",
        "remove full_attention_layers, or give window as a number",
        {"window": {"0": 8}},
        {"window": 8, "full_attention_layers": "1"},
    ),
    *(_tokens("sink_tokens", value, 0) for value in (-1, True, "4", 4.0, None, 10**12)),
    _option({"sink_tokens": 512}, "sink_tokens=512", "not below max_model_len 512", "Give fewer"),
    _option({"enabled": "yes"}, "got 'yes'", "must be true or false", "swa.enabled"),
    _option({"enabled": 0}, "got 0", "must be true or false", "swa.enabled"),
    _option({"debug_poison": 1}, "got 1", "must be true or false", "swa.debug_poison"),
    _option(
        {"position_shift": 1, "sink_tokens": 4}, "got 1", "true or false", "swa.position_shift"
    ),
    _option(
        {"position_shift": True},
        "position_shift moves",
        "there are none",
        "give sink_tokens too",
        {"window": 8, "position_shift": True, "sink_tokens": 4},
        {"window": 8},
    ),
    *(
        _option({"phase": value}, f"got {value!r}", '"both", "prefill", "decode"', "swa.phase must")
        for value in ("prompt", True, None, ["prefill"])
    ),
    _option(
        {"phase": "decode", "position_shift": True, "sink_tokens": 4},
        'swa.phase="decode"',
        "position_shift moves",
        "remove either",
        {"window": 8, "phase": "decode", "sink_tokens": 4},
        {"window": 8, "position_shift": True, "sink_tokens": 4},
    ),
    *(
        _option(
            {"phase": phase, "prefill_pages": "survivors"},
            'swa.prefill_pages="survivors"',
            "keeps every page",
            "remove either",
            {"window": 8, "phase": phase},
            {"window": 8, "prefill_pages": "survivors"},
        )
        for phase in ("prefill", "decode")
    ),
    _option({"prefill_pages": "most"}, "got 'most'", '"auto", "survivors", "all"', "prefill_pages"),
    _option({"prefill_pages": None}, "got None", '"auto", "survivors", "all"', "prefill_pages"),
    _option({"impl": "cuda"}, "got 'cuda'", 'one of "auto", "triton"', "swa.impl must be"),
    _option({"impl": ["triton"]}, "got ['triton']", 'one of "auto", "triton"', "swa.impl must be"),
    *(
        _spec(spec, f"got {spec!r}", "must be a list of layer indices or text", LAYERS)
        for spec in (3, [True], ["0"], [1.0], {"0": 1}, None)
    ),
    *(
        _spec(spec, f"{LAYERS}={spec!r}: cannot read", '"every:N" (N >= 1)', "write indices and")
        for spec in ("", "a", "1-", "3-1", "every:0", "every:x", "none,1", "1,,2", "-1", "9" * 5000)
    ),
    *(
        _spec(spec, f"{LAYERS}={spec!r}: layer", "this model has layers 0..3", "out of range")
        for spec in ("4", "0-4", "2-999999999", "100-200", [4], [-1], [10**30])
    ),
    _spec("every:5", "every:5 names none", "this model's 4 layers", "give a smaller number"),
    _spec("0-3", "='0-3' names all 4", "no window would take effect", "leave at least one layer"),
    _option(
        {"enabled": False},
        "swa.window would have no effect",
        "swa.enabled is false",
        "for a window leave enabled out",
        {"window": 8},
        {"enabled": False},
    ),
    _refused(
        "no window",
        {"swa": {"full_attention_layers": "0"}},
        "sliding_window is null or 0",
        "the checkpoint gives no window",
        "Give one, such as by --additional-config",
    ),
    *(
        _refused(
            f"{key} alone",
            {"swa": {key: value}},
            f"swa.{key} would",
            "no effect",
            "Remove it",
            {"swa": {}},
            {"swa": {key: value, "window": 8}},
        )
        for key, value in {
            "sink_tokens": 4,
            "prefill_pages": "all",
            "impl": "triton",
            "debug_poison": True,
        }.items()
    ),
]


# Keys of config.json, beside those of the tiny model; of a remedy also arguments of the engine.
CONFIGS = [
    _refused(
        "unknown layer type",
        {**SLIDING, "layer_types": ["chunked_attention"] * 4},
        "contains chunked_attention",
        "Qwen3 has full_attention and sliding_attention",
        "only",
        ({**SLIDING, "layer_types": ["sliding_attention"] * 4}, {}),
    ),
    *(
        _refused(
            f"a key of another model's, {key}",
            {**SLIDING, key: value},
            f"config has {key}={value}",
            "which nothing reads for qwen3",
            f"by the options {options}",
            (SLIDING, {}),
        )
        for key, value, options in (
            ("sliding_window_pattern", 4, "window and full_attention_layers"),
            ("swaa_config", {"sliding_window_size": 40}, "window and full_attention_layers"),
            ("attention_sinks", 4, "sink_tokens"),
        )
    ),
    _refused(
        "a RoPE by layer type",
        {
            **MIXED,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta}
                for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
            },
        },
        "rope_parameters by layer type (full_attention, sliding_attention)",
        "silently be served with the default RoPE",
        "Write the parameters of all layers, without these keys",
        (MIXED, {}),
    ),
    _refused(
        "layer types without use_sliding_window",
        {**BY_LAYER_TYPES, "use_sliding_window": False},
        "use_sliding_window is false",
        "makes transformers drop the window",
        "Set use_sliding_window=true",
        (BY_LAYER_TYPES, {}),
    ),
    _refused(
        "no layer slides",
        {**SLIDING, "max_window_layers": 4},
        "max_window_layers=4, 4 layers",
        "no layer slides",
        "override layer_types too, or use",
    ),
    _refused(
        "window of 0",
        {**SLIDING, "sliding_window": 0},
        "sliding_window is null or 0",
        "gives no window",
        "Give one, such as by --additional-config",
    ),
    *(
        _refused(
            f"window of {window}",
            {**SLIDING, "sliding_window": window},
            f"got {window}",
            "sliding_window must be an integer >= 1 and below 2**31",
            "correct the checkpoint's config.json",
            (SLIDING, {}),
        )
        for window in (-4, 10**20)
    ),
    _refused(
        "no layers",
        {**SLIDING, "num_hidden_layers": 0, "layer_types": []},
        "got 0",
        "num_hidden_layers must be an integer >= 1",
        "correct the checkpoint's config.json",
        (SLIDING, {}),
    ),
    *(
        _refused(
            f"{key}={heads}",
            {**SLIDING, key: heads},
            f"{key}={heads}",
            "is no multiple of",
            "correct the checkpoint's config.json",
            (SLIDING, {}),
        )
        for key, heads in {"num_attention_heads": 5, "num_key_value_heads": 3}.items()
    ),
    *(
        _refused(
            f"experts, max_window_layers={first}",
            {**SLIDING, **MOE, "max_window_layers": first},
            f"max_window_layers={first} would leave",
            "transformers ignores it for qwen3_moe",
            f"which layers are full: --additional-config '{{\"swa\": {remedy}}}'",
        )
        for first, remedy in {
            2: '{"full_attention_layers": "0-1"}',
            4: '{"enabled": false}',
            5: '{"enabled": false}',
        }.items()
    ),
    _refused(
        "bidirectional",
        {**SLIDING, "is_causal": False},
        "is_causal=false",
        "cannot have a window",
        "remove the window or is_causal=false",
        ({**FULL, "is_causal": False}, {}),
        (SLIDING, {}),
    ),
    _refused(
        "dual chunks",
        {**SLIDING, "dual_chunk_attention_config": {"chunk_size": 8}},
        "dual_chunk_attention_config",
        "cannot be combined with a window",
        "remove either",
        (SLIDING, {}),
    ),
]


def _engine(
    name: str,
    arguments: dict[str, Any],
    got: str,
    allowed: str,
    do: str,
    keys: Any = SLIDING,
    remedies: tuple[dict[str, Any], ...] = ({},),
) -> Bad:
    """Of ``remedies`` the arguments; by default what is wrong is left out."""
    return _refused(
        name, (keys, arguments), got, allowed, do, *((keys, remedy) for remedy in remedies)
    )


_OVERRIDE = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}


def _overriding(**keys: Any) -> Callable[[Any], Any]:
    """A function for ``hf_overrides``, as vLLM's Python interface takes it."""

    def override(config: Any) -> Any:
        config.update(keys)
        return config

    return override


def _connector(name: str = "NixlConnector", **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": extra,
    }


_NIXL = _connector()
_NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
_BFLOAT16 = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
_SINKS = {"additional_config": {"swa": {"sink_tokens": 4}}}
_ALL_SLIDE = ["sliding_attention"] * 4
_LATE = "transformers derives layer_types before"

# Keys of config.json, and arguments of vLLM's engine.
ENGINES = [
    _engine(
        "options of windows among overrides",
        {"hf_overrides": {"swa": {"window": 8}}},
        "--hf-overrides has 'swa'",
        "nothing reads options of windows",
        "leave the override out and use --additional-config",
    ),
    _engine(
        "options of windows by a function that overrides",
        {"hf_overrides": _overriding(swa={"window": 8})},
        "--hf-overrides has 'swa'",
        "nothing reads options of windows",
        "leave the override out and use --additional-config",
    ),
    _engine(
        "window by a function that overrides",
        {"hf_overrides": _overriding(sliding_window=40)},
        "--hf-overrides of sliding_window has no effect",
        _LATE,
        "Override use_sliding_window and layer_types too, or leave the override out",
        FULL,
        (
            {
                "hf_overrides": _overriding(
                    sliding_window=40, use_sliding_window=True, layer_types=_ALL_SLIDE
                )
            },
        ),
    ),
    _engine(
        "full layers by a function that overrides",
        {"hf_overrides": _overriding(max_window_layers=2)},
        "--hf-overrides of max_window_layers has no effect",
        _LATE,
        "with full_attention_layers for a mixed model",
    ),
    _engine(
        "overrides that come too late",
        {"hf_overrides": _OVERRIDE},
        "--hf-overrides of use_sliding_window, max_window_layers has no effect",
        _LATE,
        "Override layer_types too, or leave the override out",
        FULL,
        ({"hf_overrides": {**_OVERRIDE, "layer_types": _ALL_SLIDE}},),
    ),
    _engine(
        "window by override",
        {"hf_overrides": {"sliding_window": 40}},
        "--hf-overrides of sliding_window has no effect",
        _LATE,
        "Override use_sliding_window and layer_types too, or leave the override out",
        FULL,
        (
            {
                "hf_overrides": {
                    "sliding_window": 40,
                    "use_sliding_window": True,
                    "layer_types": _ALL_SLIDE,
                }
            },
        ),
    ),
    _engine(
        "full layers by override",
        {"hf_overrides": {"max_window_layers": 2}},
        "--hf-overrides of max_window_layers has no effect",
        _LATE,
        "with full_attention_layers for a mixed model",
        remedies=(
            {
                "hf_overrides": {
                    "max_window_layers": 2,
                    "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
                }
            },
        ),
    ),
    _engine(
        "window overridden by null",
        {"hf_overrides": {"sliding_window": None}},
        "sliding_window is null or 0",
        "gives no window",
        "ask for full attention with --additional-config",
    ),
    _engine(
        "layer types of another length",
        {"hf_overrides": {"layer_types": ["sliding_attention"] * 3}},
        "layer_types has 3 entries",
        "num_hidden_layers=4",
        "give one entry a layer",
        remedies=({"hf_overrides": {"layer_types": _ALL_SLIDE}},),
    ),
    _engine(
        "sliding window disabled",
        {"disable_sliding_window": True, "max_model_len": 40},
        "--disable-sliding-window was given",
        "gives no window",
        "ask for full attention with --additional-config",
        MIXED,
    ),
    _engine(
        "KV connector of one table",
        {"kv_transfer_config": _connector("ExampleConnector")},
        "the KV connector ExampleConnector",
        "knows one table of pages for all layers",
        "use NixlConnector, or remove it",
        remedies=({}, {"kv_transfer_config": _NIXL}),
    ),
    _engine(
        "KV connector that makes pages up",
        {"kv_transfer_config": _connector("DecodeBenchConnector")},
        "the KV connector DecodeBenchConnector",
        "fills pages with what no model computed",
        "use NixlConnector, or remove it",
    ),
    _engine(
        "KV connector that nobody tried",
        {"kv_transfer_config": _connector("MooncakeConnector")},
        "the KV connector MooncakeConnector",
        "was not tried with windows",
        "use NixlConnector, or remove it",
    ),
    Bad(  # by vLLM
        "KV connector without a role",
        (SLIDING, {"kv_transfer_config": {"kv_connector": "NixlConnector"}}),
        "kv_connector",
        "supported roles are",
        "Please specify kv_role",
        ValidationError,
        ValueError,
        ((SLIDING, {"kv_transfer_config": _NIXL}),),
    ),
    _engine(
        "KV connector of another package",
        {"kv_transfer_config": {**_NIXL, "kv_connector_module_path": "elsewhere.nixl"}},
        "kv_connector_module_path=elsewhere.nixl",
        "with windows NixlConnector is this plugin's",
        "leave it out",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV connector with sinks",
        {"kv_transfer_config": _NIXL, **_SINKS},
        "NixlConnector cannot be had with swa.sink_tokens=4",
        "which vLLM would not send",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL}, _SINKS),
    ),
    _engine(
        "KV connector with a window in the answer only",
        {"kv_transfer_config": _NIXL, "additional_config": {"swa": {"phase": "decode"}}},
        'NixlConnector cannot be had with swa.phase="decode"',
        "which was not tried",
        "remove either",
    ),
    _engine(
        "KV connector without the manager of several groups",
        {"kv_transfer_config": _NIXL, "disable_hybrid_kv_cache_manager": True},
        "NixlConnector cannot be had with --disable-hybrid-kv-cache-manager",
        "which leaves pages to vLLM",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV connector with stages",
        {"kv_transfer_config": _NIXL, "pipeline_parallel_size": 2},
        "NixlConnector cannot be had with pipeline stages",
        "which vLLM does not serve with it",
        "remove either",
    ),
    _engine(
        "KV connector with drafts",
        {"kv_transfer_config": _NIXL, "speculative_config": _NGRAM},
        "NixlConnector cannot be had with speculative decoding",
        "which was not tried",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL}, {"speculative_config": _NGRAM}),
    ),
    _engine(
        "KV connector in both directions",
        {"kv_transfer_config": _connector(bidirectional_kv_xfer=True)},
        "NixlConnector cannot be had with bidirectional_kv_xfer",
        "which was not tried",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV connector with poison where pages arrive",
        {
            "kv_transfer_config": _NIXL,
            "additional_config": {"swa": {"debug_poison": True}},
        },
        "NixlConnector cannot be had with swa.debug_poison",
        "would overwrite the pages that arrive",
        "remove either",
        remedies=(
            {"kv_transfer_config": _NIXL},
            {
                "kv_transfer_config": {**_NIXL, "kv_role": "kv_producer"},
                "additional_config": {"swa": {"debug_poison": True}},
            },
        ),
    ),
    _engine(
        "KV connector with another device's buffers",
        {"kv_transfer_config": {**_NIXL, "kv_buffer_device": "cuda"}},
        "NixlConnector cannot be had with kv_buffer_device=cuda",
        "which was not tried",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV cache offloading",
        {"kv_offloading_size": 1, "kv_transfer_config": _NIXL},
        "--kv-offloading-size",
        "does not start without a GPU",
        "remove it, or the window",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV connector that asks for no handshake",
        {"kv_transfer_config": _connector(enforce_handshake_compat=False)},
        "NixlConnector cannot be had with enforce_handshake_compat=false",
        "pages of another window",
        "remove either",
        remedies=({"kv_transfer_config": _NIXL},),
    ),
    _engine(
        "KV events",
        {"kv_events_config": {"enable_kv_cache_events": True}},
        "--kv-events-config",
        "pages that are not in the prefix cache",
        "Remove it",
        remedies=(
            {},
            {
                "kv_events_config": {"enable_kv_cache_events": True},
                "additional_config": {"swa": {"phase": "decode"}},
            },
        ),
    ),
    _engine(
        "pipeline",
        {"pipeline_parallel_size": 2},
        "pipeline_parallel_size=2",
        "fails in vLLM's CPU build, with a window and without",
        "Leave it at 1 (use tensor parallelism)",
    ),
    _engine(
        "more stages than layers",
        {"pipeline_parallel_size": 5},
        "pipeline_parallel_size=5",
        "leaves stage 4 without any of this model's 4 layers",
        "give fewer stages",
    ),
    _engine(
        "survivors without their manager",
        {
            "disable_hybrid_kv_cache_manager": True,
            "additional_config": {"swa": {"prefill_pages": "survivors"}},
        },
        'prefill_pages="survivors"',
        "--disable-hybrid-kv-cache-manager leaves pages to vLLM",
        'Use "auto" or "all"',
    ),
    _engine(
        "sinks without their manager",
        {
            "disable_hybrid_kv_cache_manager": True,
            "additional_config": {"swa": {"sink_tokens": 4}},
        },
        "sink_tokens cannot be had",
        "--disable-hybrid-kv-cache-manager, which leaves pages to vLLM",
        "remove either",
    ),
    _engine(
        "poison without its manager",
        {
            "disable_hybrid_kv_cache_manager": True,
            "additional_config": {"swa": {"debug_poison": True}},
        },
        "debug_poison",
        "cannot be had with --disable-hybrid-kv-cache-manager",
        "remove either",
    ),
    _engine(
        "context parallelism in decodes",
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "decode_context_parallel_size=2",
        "was not tested with windows",
        "leave it at 1",
    ),
    _engine(
        "context parallelism in prefill",
        {"prefill_context_parallel_size": 2},
        "prefill_context_parallel_size=2",
        "was not tested with windows",
        "leave it at 1",
    ),
    _engine(
        "microbatches",
        {"enable_dbo": True},
        "--enable-dbo",
        "were not tested with windows",
        "leave them out",
    ),
    _engine(
        "sinks in an fp8 cache on CPUs",
        {"kv_cache_dtype": "fp8", "additional_config": {"swa": {"sink_tokens": 4}}},
        "kv_cache_dtype=fp8:",
        "not tested on CPUs",
        "remove sink_tokens, or use --kv-cache-dtype auto",
    ),
    *(
        _engine(
            f"sinks in an fp8 cache that {kind} asks for, on CPUs",
            {"dtype": "bfloat16", "additional_config": {"swa": {"sink_tokens": 4}}},
            f"kv_cache_dtype={name} (the checkpoint asks for it)",
            "not tested on CPUs",
            "remove sink_tokens, or use --kv-cache-dtype bfloat16",
            {**SLIDING, "quantization_config": FP8_CACHE[kind]},
            ({"dtype": "bfloat16"}, {**_SINKS, **_BFLOAT16}),
        )
        for kind, name in (("compressed-tensors", "fp8"), ("modelopt", "fp8_e4m3"))
    ),
    _engine(
        "sinks in fp32 and in an fp8 cache that the checkpoint asks for, on CPUs",
        _SINKS,
        "kv_cache_dtype=fp8 (the checkpoint asks for it)",
        "not tested on CPUs",
        "use --dtype bfloat16 --kv-cache-dtype bfloat16",
        {**SLIDING, "quantization_config": FP8_CACHE["compressed-tensors"]},
        ({}, {**_SINKS, **_BFLOAT16}),
    ),
    _engine(
        "shifted sinks in time and space",
        {"additional_config": {"swa": {"sink_tokens": 4, "position_shift": True}}},
        "position_shift in a model",
        "RoPE has positions in time and space",
        "remove position_shift",
        {**SLIDING, "rope_parameters": {**ROPE["default"], "mrope_section": [8, 4, 4]}},
    ),
    _engine(
        "more shifted sinks than operators have room for",
        {"additional_config": {"swa": {"sink_tokens": 241, "position_shift": True}}},
        "got 241",
        "allows at most 240 sink_tokens with a head size of 32",
        "give fewer, or remove position_shift",
    ),
    _engine(
        "poison in workers",
        {"tensor_parallel_size": 2, "additional_config": {"swa": {"debug_poison": True}}},
        "swa.debug_poison",
        "only with scheduler and worker in the main process",
        "or remove debug_poison",
    ),
]
