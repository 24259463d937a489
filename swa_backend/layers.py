"""Which layers slide and how far: the checkpoint's config and the user's options, resolved."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swa_backend.options import (
    EXAMPLE_WINDOWS,
    SERVE_FULL,
    SLIDE_ALL,
    USE_OPTIONS,
    Impl,
    PrefillPages,
    SWAConfigError,
    SWAOptions,
    example_with_window,
    given_keys,
    is_count,
    parse_layers,
    shown_value,
)
from swa_backend.window import Phase

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# transformers' model types whose layers are, but for some with full attention, linear.
HYBRID_MODELS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Keys that are read here, and one that the engine sets for a purpose of its own.
_KNOWN_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "rswa_window")
_WORDS_OF_WINDOWS = frozenset({"sliding", "window", "windows", "swa", "swaa"})
_WORDS_OF_SINKS = frozenset({"sink", "sinks"})


@dataclass(frozen=True)
class LayerPlan:
    """What each layer attends to.

    Attributes:
        windows: one entry a layer: its window in tokens, or None for none.
        warnings: remarks for the log: settings that are legal but probably not meant.
        linear: the layers with linear attention, which have a state in the place of a KV cache.
    """

    windows: tuple[int | None, ...]
    warnings: tuple[str, ...] = ()
    linear: frozenset[int] = frozenset()

    @property
    def slides(self) -> bool:
        """Whether any layer has a window."""
        return any(window is not None for window in self.windows)

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, as transformers' ``layer_types`` names it."""
        return [
            LINEAR if index in self.linear else FULL if window is None else SLIDING
            for index, window in enumerate(self.windows)
        ]


def describe_windows(layers: LayerPlan, options: SWAOptions) -> str:
    """Say in one line what slides, such as ``window 128, 4 sink tokens, 23 of 30 layers slide``."""
    num_layers = len(layers.windows)
    windows = sorted({window for window in layers.windows if window is not None})
    if not windows:
        return f"none of {num_layers} layers slides"
    num_sliding = num_layers - layers.windows.count(None)
    parts = [f"window {' and '.join(map(str, windows))}"]
    if options.sink_tokens:
        shifted = ", shifted" if options.position_shift else ""
        parts.append(f"{options.sink_tokens} sink tokens{shifted}")
    if options.phase is not Phase.BOTH:
        parts.append(f"phase {options.phase}")
    return ", ".join([*parts, f"{num_sliding} of {num_layers} layers slide"])


def resolve_layers(
    hf_config: Any,
    options: SWAOptions,
    *,
    hf_overrides: Mapping[str, Any] | None = None,
    max_model_len: int | None = None,
) -> LayerPlan:
    """Resolve the window of every layer of a Qwen3: dense, MoE, or a derived model's text layers.

    Layers with linear attention (of Qwen3-Next and Qwen3.5) have none, and no option may name one.

    Options win over the checkpoint; in the checkpoint an explicit ``layer_types`` wins over
    ``max_window_layers``. transformers (5.19) knows neither for MoE and slides every layer once
    ``use_sliding_window`` is true; an explicit ``layer_types`` is followed here all the same.
    Derived models, whose windows transformers ignores altogether, are read like MoE.

    Args:
        hf_config: a ``Qwen3Config`` (``layer_types`` already derived by transformers), a
            ``Qwen3MoeConfig``, or the text config of a derived model.
        options: the user's options.
        hf_overrides: what the user changed by ``--hf-overrides``. transformers derives
            ``layer_types`` *before* vLLM applies these, so some of them have no effect.
        max_model_len: longest request in tokens, to warn of a window that never slides.

    Raises:
        SWAConfigError: contradictory or ineffective settings, with the remedy.
    """
    num_layers: int = hf_config.num_hidden_layers
    if not is_count(num_layers):
        raise SWAConfigError(
            f"num_hidden_layers must be an integer >= 1, got {num_layers!r}; correct the "
            "checkpoint's config.json"
        )
    if not options.enabled:
        if options.window is not None or options.full_attention_layers is not None:
            raise _without_effect([key for key in given_keys(options) if key != "enabled"], options)
        return _full_attention_layers(num_layers, options)
    linear = _linear_layers(hf_config, num_layers)
    by_layer = _windows_by_layer(options, num_layers, linear)
    if by_layer:
        full_layers = tuple(i for i in range(num_layers) if i not in {*by_layer, *linear})
        options = replace(options, window=max(by_layer.values()), full_attention_layers=full_layers)
    _check_unread_keys(hf_config, options)
    layer_types = _checkpoint_layer_types(hf_config, num_layers, options, hf_overrides or {})
    if hf_config.model_type == "qwen3":
        _check_overridden_layers(hf_config, layer_types, options, hf_overrides or {})
    if options.window is None and options.full_attention_layers is None:
        _check_layers_of_checkpoint(hf_config, layer_types)

    full = _full_layers(options, layer_types, linear)
    if len(full) + len(linear) == num_layers:
        if options.full_attention_layers is not None:
            raise SWAConfigError(
                f"swa.full_attention_layers={options.full_attention_layers!r} names all "
                f"{len(full)} layers{' that attend' if linear else ''}, so no window would take "
                f"effect; leave at least one layer out, or ask for full attention with {SERVE_FULL}"
            )
        return _full_attention_layers(num_layers, options)
    _check_one_rope(hf_config)
    window = (
        options.window if options.window is not None else _checkpoint_window(hf_config, options)
    )
    assert isinstance(window, int)
    windows = tuple(
        None if i in {*full, *linear} else by_layer.get(i, window) for i in range(num_layers)
    )
    if max_model_len is not None and options.sink_tokens >= max_model_len:
        raise SWAConfigError(
            f"swa.sink_tokens={options.sink_tokens} is not below max_model_len {max_model_len}: "
            "every token of every text would stay. Give fewer (4 are usual), or a longer "
            "--max-model-len"
        )
    return LayerPlan(
        windows,
        (
            *_warnings_of_phase(layer_types, options),
            *_warnings_of_layers(hf_config, windows, options, hf_overrides or {}, max_model_len),
        ),
        linear,
    )


def _linear_layers(hf_config: Any, num_layers: int) -> frozenset[int]:
    if hf_config.model_type not in HYBRID_MODELS:
        return frozenset()
    layer_types = list(hf_config.layer_types)[:num_layers]
    linear = frozenset(i for i, kind in enumerate(layer_types) if kind == LINEAR)
    if len(linear) == num_layers:
        raise SWAConfigError(
            "all layers of this model have linear attention, and none could have a window; serve "
            "another model, or remove the window"
        )
    return linear


def _check_attend(
    layers: frozenset[int], linear: frozenset[int], num_layers: int, what: str
) -> None:
    """Refuse layers that have no attention to give, or to leave without, a window."""
    if idle := sorted(layers & linear):
        attending = ", ".join(str(i) for i in range(num_layers) if i not in linear)
        raise SWAConfigError(
            f"{what} names layer {idle[0]}, which has linear attention and no KV cache; name some "
            f"of those that attend: {attending}"
        )


def _check_unread_keys(hf_config: Any, options: SWAOptions) -> None:
    """Refuse keys that speak of windows or sinks and that nobody reads, unless options decide."""
    for key, value in vars(hf_config).items():
        words = frozenset(key.lower().split("_"))
        if not value or key in _KNOWN_KEYS or not words & (_WORDS_OF_WINDOWS | _WORDS_OF_SINKS):
            continue
        if words & _WORDS_OF_SINKS:
            decided = options.sink_tokens > 0
            meant, example = "sink_tokens", '"sink_tokens": 4'
        else:
            decided = options.window is not None and options.full_attention_layers is not None
            meant, example = "window and full_attention_layers", '"full_attention_layers": "none"'
        if not decided:
            write = f"""--additional-config '{{"swa": {{"window": 4096, {example}}}}}'"""
            raise SWAConfigError(
                f"the checkpoint's config has {key}={shown_value(value)}, which nothing reads for "
                f"{hf_config.model_type}. Say what it means by the options {meant}, as in {write}; "
                f"or remove it from config.json; or ask for full attention with {SERVE_FULL}"
            )


def _windows_by_layer(
    options: SWAOptions, num_layers: int, linear: frozenset[int]
) -> dict[int, int]:
    """The window of each layer that ``window`` names; empty where it is one for all."""
    windows = dict[int, int]()
    if not isinstance(options.window, tuple):
        return windows
    for spec, window in options.window:
        layers = parse_layers(spec, num_layers, "window")
        if not layers:
            raise SWAConfigError(
                f"swa.window={dict(options.window)}: {spec!r} names no layer; leave it out, as "
                "layers that are not named are full"
            )
        _check_attend(layers, linear, num_layers, f"swa.window={dict(options.window)}")
        if twice := sorted(layers & windows.keys()):
            raise SWAConfigError(
                f"swa.window={dict(options.window)} names layer {twice[0]} twice; name each layer "
                f"that slides once, as in {EXAMPLE_WINDOWS}"
            )
        windows |= dict.fromkeys(layers, window)
    return windows


def _check_one_rope(hf_config: Any) -> None:
    rope = getattr(hf_config, "rope_parameters", None)
    if isinstance(rope, Mapping) and (kinds := sorted({FULL, SLIDING} & rope.keys())):
        raise SWAConfigError(
            f"the checkpoint's config has rope_parameters by layer type ({', '.join(kinds)}), and "
            "the layers of a Qwen3 take the same from it: by such keys they would silently be "
            "served with the default RoPE. Write the parameters of all layers, without these keys, "
            "into config.json"
        )


def _full_attention_layers(num_layers: int, options: SWAOptions) -> LayerPlan:
    idle = [
        key
        for key, is_set in (
            ("phase", options.phase is not Phase.BOTH),
            ("sink_tokens", options.sink_tokens > 0),
            ("prefill_pages", options.prefill_pages is not PrefillPages.AUTO),
            ("impl", options.impl is not Impl.AUTO),
            ("debug_poison", options.debug_poison),
        )
        if is_set
    ]
    if idle:
        raise _without_effect(idle, options)
    return LayerPlan((None,) * num_layers)


def _without_effect(idle: Sequence[str], options: SWAOptions) -> SWAConfigError:
    what = f"swa.{', '.join(idle)} would have no effect: "
    if not options.enabled:
        return SWAConfigError(
            f"{what}swa.enabled is false. For full attention leave {', '.join(idle)} out; for a "
            "window leave enabled out"
        )
    return SWAConfigError(
        f"{what}no layer has a window. Remove it, or give a window, such as by "
        f"{example_with_window(options)}"
    )


def _full_layers(
    options: SWAOptions, layer_types: Sequence[str], linear: frozenset[int]
) -> frozenset[int]:
    if (spec := options.full_attention_layers) is not None:
        layers = parse_layers(spec, len(layer_types))
        _check_attend(layers, linear, len(layer_types), f"swa.full_attention_layers={spec!r}")
        return layers
    full = frozenset(i for i, kind in enumerate(layer_types) if kind == FULL)
    # One option turns a full-attention checkpoint into a sliding one.
    if options.window is not None and len(full) + len(linear) == len(layer_types):
        return frozenset()
    return full


def _warnings_of_phase(layer_types: Sequence[str], options: SWAOptions) -> Iterator[str]:
    if options.phase is not Phase.BOTH and SLIDING in layer_types:
        yield (
            f'the checkpoint was trained with a window, and swa.phase="{options.phase}" gives '
            "some of its tokens a mask that it never saw. Remove phase, unless this is meant"
        )


def _warnings_of_layers(
    hf_config: Any,
    windows: Sequence[int | None],
    options: SWAOptions,
    hf_overrides: Mapping[str, Any],
    max_model_len: int | None,
) -> Iterator[str]:
    if max_model_len is None:
        return
    sinks, distinct = options.sink_tokens, sorted({w for w in windows if w is not None})
    idle = [window for window in distinct if window + sinks >= max_model_len]
    for window in idle:
        kept = f"window {window}" + (f" with {sinks} sink tokens" if sinks else "")
        what = "nothing will ever slide" if len(distinct) == 1 else "its layers never slide"
        yield f"{kept} is not below max_model_len {max_model_len}: {what}"
    if len(idle) < len(distinct) and sinks and not options.position_shift:
        trained, may_be_shorter = trained_len(hf_config), "max_position_embeddings" in hf_overrides
        if max_model_len > trained or may_be_shorter:
            yield (
                f"sink tokens keep their positions, and max_model_len {max_model_len} goes beyond "
                f"the trained length{'' if may_be_shorter else f' of {trained}'}: distances to "
                "them will be longer than any in training. Set swa.position_shift=true, or lower "
                "max_model_len"
            )


def trained_len(hf_config: Any) -> int:
    """Give the longest text in tokens that the model was trained on, before any RoPE scaling."""
    rope: Mapping[str, Any] = getattr(hf_config, "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings") or hf_config.max_position_embeddings
    return int(trained)


def _checkpoint_layer_types(
    hf_config: Any, num_layers: int, options: SWAOptions, overrides: Mapping[str, Any]
) -> list[str]:
    if getattr(hf_config, "layer_types", None) is None:
        return _uniform_layer_types(hf_config, num_layers, options)
    layer_types = list(hf_config.layer_types)
    if set(layer_types) == {FULL}:
        return [FULL] * num_layers  # however many transformers derived, or somebody wrote
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        layer_types = layer_types[:num_layers]  # vLLM takes the checkpoint's first layers
    if len(layer_types) != num_layers:
        raise SWAConfigError(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers={num_layers}; "
            "give one entry a layer"
        )
    is_hybrid = hf_config.model_type in HYBRID_MODELS
    model, other = (hf_config.model_type, LINEAR) if is_hybrid else ("Qwen3", SLIDING)
    if unknown := sorted(set(layer_types) - {FULL, other}):
        raise SWAConfigError(
            f"layer_types contains {', '.join(unknown)}; {model} has {FULL} and {other} only; "
            "correct the checkpoint's config.json"
        )
    return layer_types


def _uniform_layer_types(hf_config: Any, num_layers: int, options: SWAOptions) -> list[str]:
    """Give every layer one kind, as transformers does for a Qwen3-MoE without ``layer_types``."""
    if not getattr(hf_config, "use_sliding_window", None):
        return [FULL] * num_layers
    first = getattr(hf_config, "max_window_layers", None)
    if first and options.full_attention_layers is None:
        some = f"""--additional-config '{{"swa": {{"full_attention_layers": "0-{first - 1}"}}}}'"""
        is_all = first >= num_layers
        raise SWAConfigError(
            f"max_window_layers={first} would leave {'all' if is_all else 'these'} layers full, "
            f"but transformers ignores it for {hf_config.model_type} without layer_types. Say "
            f"which layers are full: {SERVE_FULL if is_all else some} (or, for no layer, "
            f"{SLIDE_ALL})"
        )
    return [SLIDING] * num_layers


def _checkpoint_window(hf_config: Any, options: SWAOptions) -> int:
    window = getattr(hf_config, "sliding_window", None)
    if window is None or window == 0:
        raise SWAConfigError(
            "layers are to slide but the checkpoint gives no window: sliding_window is null or 0, "
            "or --disable-sliding-window was given. Give one, such as by "
            f"{example_with_window(options)}, or ask for full attention with {SERVE_FULL}"
        )
    if not is_count(window):
        raise SWAConfigError(
            "sliding_window must be an integer >= 1 and below 2**31, got "
            f"{shown_value(window)}; correct the checkpoint's config.json, or give a window, "
            f"such as by {example_with_window(options)}"
        )
    return window


def _check_layers_of_checkpoint(hf_config: Any, layer_types: Sequence[str]) -> None:
    slides, use = SLIDING in layer_types, getattr(hf_config, "use_sliding_window", None)
    if use is None and not slides and getattr(hf_config, "sliding_window", None):
        raise SWAConfigError(
            f"sliding_window={hf_config.sliding_window} without use_sliding_window is ambiguous "
            f"for {hf_config.model_type}: transformers ignores it, vLLM slides every layer. Give "
            f"the window, such as by {USE_OPTIONS}, or ask for full attention with {SERVE_FULL}"
        )
    if slides and use is False:
        raise SWAConfigError(
            "layer_types has sliding layers but use_sliding_window is false, which makes "
            "transformers drop the window. Set use_sliding_window=true in the checkpoint's "
            f"config.json, or give a window, such as by {USE_OPTIONS}"
        )
    if use and not slides:
        raise SWAConfigError(
            "use_sliding_window is true but no layer slides: layer_types is all full_attention "
            f"(max_window_layers={getattr(hf_config, 'max_window_layers', None)}, "
            f"{len(layer_types)} layers). If the window came by --hf-overrides: transformers "
            "derives layer_types before overrides apply; override layer_types too, or use "
            f"{USE_OPTIONS}. For full attention use {SERVE_FULL}"
        )


def _check_overridden_layers(
    hf_config: Any,
    layer_types: Sequence[str],
    options: SWAOptions,
    overrides: Mapping[str, Any],
) -> None:
    """Refuse overrides of window keys that came too late to have any effect."""
    if "layer_types" in overrides:
        return
    late = [key for key in ("use_sliding_window", "max_window_layers") if key in overrides]
    wanted = [
        SLIDING if hf_config.use_sliding_window and i >= hf_config.max_window_layers else FULL
        for i in range(len(layer_types))
    ]
    if (late and wanted != layer_types) or (
        overrides.get("sliding_window") and SLIDING not in layer_types and options.window is None
    ):
        keys = ", ".join(late or ["sliding_window"])
        missing = (
            "layer_types" if hf_config.use_sliding_window else "use_sliding_window and layer_types"
        )
        raise SWAConfigError(
            f"--hf-overrides of {keys} has no effect: transformers derives layer_types before "
            f"overrides apply, and layer_types decides. Override {missing} too, or leave the "
            f"override out and use {USE_OPTIONS} (with full_attention_layers for a mixed model)"
        )
