"""Which layers slide and how far: the checkpoint's config and the user's options, resolved.

Contradictory or ineffective settings raise :class:`SWAConfigError` before any weight is loaded;
nothing falls back to full attention silently.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
OPTION_KEYS = (
    "enabled",
    "window",
    "sink_tokens",
    "position_shift",
    "full_attention_layers",
    "prefill_pages",
    "impl",
    "debug_poison",
)
_NOT_BUILT = frozenset({"sink_tokens", "position_shift", "prefill_pages", "impl", "debug_poison"})
_USE_OPTIONS = """--additional-config '{"swa": {"window": W}}'"""
_SERVE_FULL = """--additional-config '{"swa": {"enabled": false}}'"""


class SWAConfigError(ValueError):
    """A window configuration that cannot be served as asked."""


@dataclass(frozen=True)
class SWAOptions:
    """The ``swa`` section of vLLM's ``--additional-config``.

    Attributes:
        enabled: false serves full attention in every layer, whatever the checkpoint says.
        window: keys a sliding layer sees, the token itself included; None takes the checkpoint's.
        full_attention_layers: layers that keep full attention: indices, or text such as
            ``"0-3,27"``, ``"every:4"`` (layers 3, 7, 11, ...) or ``"none"``; None takes the
            checkpoint's.
    """

    enabled: bool = True
    window: int | None = None
    full_attention_layers: str | tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, raw: object) -> "SWAOptions":
        """Validate the ``swa`` section as parsed from JSON.

        Raises:
            SWAConfigError: unknown or unbuilt key, wrong type, or a window below 1.
        """
        if not isinstance(raw, Mapping):
            raise SWAConfigError(
                f"swa: expected an object with keys from {', '.join(OPTION_KEYS)}; got {raw!r}. "
                f"Example: {_USE_OPTIONS}"
            )
        if unknown := sorted(map(str, set(raw) - set(OPTION_KEYS))):
            raise SWAConfigError(
                f"swa: unknown key {', '.join(unknown)}; allowed are {', '.join(OPTION_KEYS)}"
            )
        if unbuilt := sorted(set(raw) & _NOT_BUILT):
            raise SWAConfigError(
                f"swa: {', '.join(unbuilt)} is reserved but not built in this version; remove it"
            )
        checks: dict[str, Callable[[Any], Any]] = {
            "enabled": _checked_bool,
            "window": _checked_window,
            "full_attention_layers": _checked_layers,
        }
        return cls(**{key: checks[key](value) for key, value in raw.items()})


@dataclass(frozen=True)
class LayerPlan:
    """What each layer attends to.

    Attributes:
        windows: one entry a layer: its window in tokens, or None for full attention.
        warnings: remarks for the log: settings that are legal but probably not meant.
    """

    windows: tuple[int | None, ...]
    warnings: tuple[str, ...] = ()

    @property
    def slides(self) -> bool:
        """Whether any layer has a window."""
        return any(window is not None for window in self.windows)

    @property
    def layer_types(self) -> list[str]:
        """The plan in the words of transformers' ``layer_types``."""
        return [FULL if window is None else SLIDING for window in self.windows]


def parse_layers(spec: str | Iterable[int], num_layers: int) -> frozenset[int]:
    """Layer indices named by ``spec`` (see :attr:`SWAOptions.full_attention_layers`).

    Raises:
        SWAConfigError: text that does not parse, or an index outside ``0..num_layers-1``.
    """
    if isinstance(spec, str):
        layers = set[int]()
        for part in spec.split(","):
            layers |= _parse_part(part.strip(), spec, num_layers)
    else:
        layers = set(spec)
    if outside := sorted(i for i in layers if not 0 <= i < num_layers):
        raise SWAConfigError(
            f"swa.full_attention_layers={spec!r}: layer {outside[0]} is out of range; "
            f"this model has layers 0..{num_layers - 1}"
        )
    return frozenset(layers)


def resolve_layers(
    hf_config: Any,
    options: SWAOptions,
    *,
    hf_overrides: Mapping[str, Any] | None = None,
    max_model_len: int | None = None,
) -> LayerPlan:
    """The window of every layer of a Qwen3, dense or MoE.

    Options win over the checkpoint; in the checkpoint an explicit ``layer_types`` wins over
    ``max_window_layers``. transformers (5.19) knows neither for MoE and slides every layer once
    ``use_sliding_window`` is true; an explicit ``layer_types`` is followed here all the same.

    Args:
        hf_config: a ``Qwen3Config`` (``layer_types`` already derived by transformers) or a
            ``Qwen3MoeConfig``.
        options: the user's options.
        hf_overrides: what the user changed by ``--hf-overrides``. transformers derives
            ``layer_types`` *before* vLLM applies these, so some of them have no effect.
        max_model_len: longest request in tokens, to warn of a window that never slides.

    Raises:
        SWAConfigError: contradictory or ineffective settings, with the remedy.
    """
    num_layers: int = hf_config.num_hidden_layers
    if not options.enabled:
        if options.window is not None or options.full_attention_layers is not None:
            raise SWAConfigError(
                "swa: enabled=false contradicts window / full_attention_layers; remove either"
            )
        return LayerPlan((None,) * num_layers)
    layer_types = _checkpoint_layer_types(hf_config, num_layers, options)
    if hf_config.model_type != "qwen3_moe":
        _check_overrides(hf_config, layer_types, options, hf_overrides or {})
    if options.window is None and options.full_attention_layers is None:
        _check_checkpoint(hf_config, layer_types)

    full = _full_layers(options, layer_types)
    if len(full) == num_layers:
        if options.full_attention_layers is not None:
            raise SWAConfigError(
                f"swa.full_attention_layers={options.full_attention_layers!r} names all "
                f"{num_layers} layers, so no window would take effect; leave at least one layer "
                f"out, or ask for full attention with {_SERVE_FULL}"
            )
        return LayerPlan((None,) * num_layers)
    window = options.window if options.window is not None else _checkpoint_window(hf_config)
    return LayerPlan(
        tuple(None if i in full else window for i in range(num_layers)),
        _warnings(window, max_model_len),
    )


def _full_layers(options: SWAOptions, layer_types: Sequence[str]) -> frozenset[int]:
    if options.full_attention_layers is not None:
        return parse_layers(options.full_attention_layers, len(layer_types))
    full = frozenset(i for i, kind in enumerate(layer_types) if kind == FULL)
    # One option turns a full-attention checkpoint into a sliding one.
    if options.window is not None and len(full) == len(layer_types):
        return frozenset()
    return full


def _warnings(window: int, max_model_len: int | None) -> tuple[str, ...]:
    if max_model_len is None or window < max_model_len:
        return ()
    return (f"window {window} is not below max_model_len {max_model_len}: nothing will ever slide",)


def _checkpoint_layer_types(hf_config: Any, num_layers: int, options: SWAOptions) -> list[str]:
    if getattr(hf_config, "layer_types", None) is None:
        return _moe_layer_types(hf_config, num_layers, options)
    layer_types = list(hf_config.layer_types)
    if len(layer_types) != num_layers:
        raise SWAConfigError(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers={num_layers}; "
            "give one entry a layer"
        )
    if unknown := sorted(set(layer_types) - {FULL, SLIDING}):
        raise SWAConfigError(
            f"layer_types contains {', '.join(unknown)}; Qwen3 has {FULL} and {SLIDING} only"
        )
    return layer_types


def _moe_layer_types(hf_config: Any, num_layers: int, options: SWAOptions) -> list[str]:
    """What transformers does with a Qwen3-MoE without ``layer_types``: all layers or none."""
    if not hf_config.use_sliding_window:
        return [FULL] * num_layers
    first = getattr(hf_config, "max_window_layers", None)
    if first and options.full_attention_layers is None:
        raise SWAConfigError(
            f"max_window_layers={first} would leave layers full, but transformers ignores it for "
            "Qwen3-MoE and slides all layers. Say which layers are full: "
            f"""--additional-config '{{"swa": {{"full_attention_layers": "0-{first - 1}"}}}}' """
            '(or "none" for no layer)'
        )
    return [SLIDING] * num_layers


def _checkpoint_window(hf_config: Any) -> int:
    window = hf_config.sliding_window
    if window is None or window == 0:
        raise SWAConfigError(
            "layers are to slide but the checkpoint gives no window: sliding_window is null or 0, "
            "or --disable-sliding-window was given. Give one with "
            f"{_USE_OPTIONS}, or ask for full attention with {_SERVE_FULL}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SWAConfigError(f"sliding_window must be an integer >= 1, got {window!r}")
    return window


def _check_checkpoint(hf_config: Any, layer_types: Sequence[str]) -> None:
    slides = SLIDING in layer_types
    if slides and not hf_config.use_sliding_window:
        raise SWAConfigError(
            "layer_types has sliding layers but use_sliding_window is false, which makes "
            "transformers drop the window. Set use_sliding_window=true in the checkpoint's "
            f"config.json, or give a window with {_USE_OPTIONS}"
        )
    if hf_config.use_sliding_window and not slides:
        raise SWAConfigError(
            "use_sliding_window is true but no layer slides: layer_types is all full_attention "
            f"(max_window_layers={getattr(hf_config, 'max_window_layers', None)}, "
            f"{len(layer_types)} layers). If the window came by --hf-overrides: transformers "
            "derives layer_types before overrides apply; override layer_types too, or use "
            f"{_USE_OPTIONS}. For full attention use {_SERVE_FULL}"
        )


def _check_overrides(
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
        raise SWAConfigError(
            f"--hf-overrides of {keys} has no effect: transformers derives layer_types before "
            "overrides apply, and layer_types decides. Override layer_types too, or use "
            f"{_USE_OPTIONS} (with full_attention_layers for a mixed model)"
        )


def _checked_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise SWAConfigError(f"swa.enabled must be true or false, got {value!r}")
    return value


def _checked_window(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SWAConfigError(
            f"swa.window must be an integer >= 1 (tokens a query sees, itself included), "
            f"got {value!r}"
        )
    return value


def _checked_layers(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    ):
        return tuple(value)
    raise SWAConfigError(
        "swa.full_attention_layers must be a list of layer indices or text such as "
        f'"0-3,27", "every:4" or "none"; got {value!r}'
    )


def _parse_part(part: str, spec: str, num_layers: int) -> set[int]:
    first, dash, last = part.partition("-")
    if part == "none" and spec.strip() == "none":
        return set()
    if part.startswith("every:") and part[6:].isdecimal() and int(part[6:]) >= 1:
        step = int(part[6:])
        return set(range(step - 1, num_layers, step))
    if part.isdecimal():
        return {int(part)}
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        return set(range(int(first), int(last) + 1))
    raise SWAConfigError(
        f"swa.full_attention_layers={spec!r}: cannot read {part!r}; write indices and ranges "
        '("0-3,27"), "every:N" (N >= 1) or "none"'
    )
