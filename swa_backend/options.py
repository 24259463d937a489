"""The user's options: a closed list of keys, validated.

Contradictory or ineffective settings raise :class:`SWAConfigError` before any weight is loaded;
nothing falls back to full attention silently.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from typing import Any, TypeGuard

from swa_backend.window import Phase

OPTION_KEYS = (
    "enabled",
    "window",
    "phase",
    "sink_tokens",
    "position_shift",
    "full_attention_layers",
    "prefill_pages",
    "impl",
    "debug_poison",
)
# Positions are int32 in kernels and in vLLM's block tables.
MOST_TOKENS = 2**31 - 1
USE_OPTIONS = """--additional-config '{"swa": {"window": 4096}}'"""
EXAMPLE_WINDOWS = '{"0-11": 1024, "12-35": 4096}'
SERVE_FULL = """--additional-config '{"swa": {"enabled": false}}'"""
SLIDE_ALL = """--additional-config '{"swa": {"full_attention_layers": "none"}}'"""


class SWAConfigError(ValueError):
    """A window configuration that cannot be served as asked."""


class Impl(StrEnum):
    """What computes attention in windowed layers.

    ``AUTO``: this project's Triton kernels on GPUs, vLLM's own operators elsewhere. ``TRITON``: the
    kernels anywhere; on a CPU they run in Triton's interpreter, a debugging aid.
    """

    AUTO = "auto"
    TRITON = "triton"


class PrefillPages(StrEnum):
    """Which pages of a prefill chunk are stored.

    ``SURVIVORS``: those that a token after the chunk can see. ``ALL``: every page, as vLLM does.
    ``AUTO``: survivors, and the others too while the pool has room for them as prefix cache.
    """

    AUTO = "auto"
    SURVIVORS = "survivors"
    ALL = "all"


@dataclass(frozen=True)
class SWAOptions:
    """The ``swa`` section of vLLM's ``--additional-config``.

    Attributes:
        enabled: false serves full attention in every layer, whatever the checkpoint says.
        window: keys a sliding layer sees, the token itself included; None takes the checkpoint's.
            Or a window of its own for some layers, as pairs of layers (text, as for
            ``full_attention_layers``) and tokens; all other layers are full then.
        phase: whose queries have the window: the prompt's, the generated tokens', or both.
        full_attention_layers: layers that keep full attention: indices, or text such as
            ``"0-3,27"``, ``"every:4"`` (layers 3, 7, 11, ...) or ``"none"``; None takes the
            checkpoint's.
        sink_tokens: leading tokens that every query of a sliding layer sees.
        position_shift: sinks lie just before the window, wherever it is (StreamingLLM's
            cache-relative positions, https://arxiv.org/abs/2309.17453).
        prefill_pages: which pages of a prefill chunk are stored.
        impl: what computes attention.
        debug_poison: fill free pages with NaN at every step and check what layers return.
    """

    enabled: bool = True
    window: int | tuple[tuple[str, int], ...] | None = None
    phase: Phase = Phase.BOTH
    full_attention_layers: str | tuple[int, ...] | None = None
    sink_tokens: int = 0
    position_shift: bool = False
    prefill_pages: PrefillPages = PrefillPages.AUTO
    impl: Impl = Impl.AUTO
    debug_poison: bool = False

    @classmethod
    def from_dict(cls, raw: object) -> "SWAOptions":
        """Validate the ``swa`` section as parsed from JSON.

        Raises:
            SWAConfigError: unknown key, wrong type, a number out of range, a position shift
                without sinks, or a phase that is not served or contradicts ``prefill_pages``.
        """
        if not isinstance(raw, Mapping):
            raise SWAConfigError(
                f"swa: expected an object with keys from {', '.join(OPTION_KEYS)}; got {raw!r}. "
                f"Example: {USE_OPTIONS}"
            )
        if unknown := sorted(map(str, set(raw) - set(OPTION_KEYS))):
            raise SWAConfigError(
                f"swa: unknown key {', '.join(unknown)}{_closest_option_key(unknown[0])}; "
                f"allowed are {', '.join(OPTION_KEYS)}"
            )
        checks: dict[str, Callable[[Any], Any]] = {
            "enabled": partial(_checked_bool, "enabled"),
            "window": _checked_window,
            "phase": partial(_checked_choice, "phase", Phase),
            "sink_tokens": partial(_checked_tokens, "sink_tokens", 0, "that stay visible"),
            "position_shift": partial(_checked_bool, "position_shift"),
            "full_attention_layers": _checked_layers,
            "prefill_pages": partial(_checked_choice, "prefill_pages", PrefillPages),
            "impl": partial(_checked_choice, "impl", Impl),
            "debug_poison": partial(_checked_bool, "debug_poison"),
        }
        options = cls(**{key: checks[key](value) for key, value in raw.items()})
        if isinstance(options.window, tuple) and options.full_attention_layers is not None:
            raise SWAConfigError(
                "swa.window names the layers that slide, and swa.full_attention_layers names "
                "layers too; all that window does not name are full: remove full_attention_layers, "
                "or give window as a number"
            )
        if options.position_shift and not options.sink_tokens:
            raise SWAConfigError(
                "swa.position_shift moves sink tokens, and there are none: give sink_tokens too, "
                "or remove position_shift"
            )
        if options.phase is Phase.DECODE and options.position_shift:
            raise SWAConfigError(
                'swa.position_shift moves sink tokens, and with swa.phase="decode" generated '
                "tokens see the whole prompt, sinks included, where it is; remove either"
            )
        if options.phase is not Phase.BOTH and options.prefill_pages is PrefillPages.SURVIVORS:
            raise SWAConfigError(
                f'swa.phase="{options.phase}" keeps every page of a prompt, because generated '
                'tokens see all of them, and swa.prefill_pages="survivors" drops some; remove '
                "either"
            )
        return options


def given_keys(options: SWAOptions) -> list[str]:
    """Name the options that differ from their default, in the order of :data:`OPTION_KEYS`."""
    defaults = SWAOptions()
    return [key for key in OPTION_KEYS if getattr(options, key) != getattr(defaults, key)]


def example_with_window(options: SWAOptions) -> str:
    """Spell ``options`` as a flag of vLLM, with a window that stands for any."""
    given = {key: getattr(options, key) for key in given_keys(options)}
    return f"--additional-config '{json.dumps({'swa': {'window': 4096, **given}})}'"


def is_section(key: object) -> bool:
    """Whether a key names the section of options, in whatever case."""
    return str(key).lower() == "swa"


def parse_layers(
    spec: str | Iterable[int], num_layers: int, key: str = "full_attention_layers"
) -> frozenset[int]:
    """Parse the layers that ``spec`` names (see :attr:`SWAOptions.full_attention_layers`).

    Args:
        key: the option that has it, for messages.

    Raises:
        SWAConfigError: text that does not parse, or an index outside ``0..num_layers-1``.
    """
    if isinstance(spec, str):
        layers = set[int]()
        for part in spec.split(","):
            layers |= _parse_layer_range(part.strip(), spec, num_layers, key)
    else:
        layers = set(spec)
    shown = spec if isinstance(spec, str) else sorted(layers)
    if outside := sorted(i for i in layers if not 0 <= i < num_layers):
        raise SWAConfigError(
            f"swa.{key}={shown!r}: layer {outside[0]} is out of range; "
            f"this model has layers 0..{num_layers - 1}"
        )
    return frozenset(layers)


def _checked_bool(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SWAConfigError(f"swa.{key} must be true or false, got {value!r}")
    return value


def _checked_choice(key: str, choices: type[StrEnum], value: object) -> StrEnum:
    for choice in choices:
        if value == choice.value:
            return choice
    allowed = ", ".join(f'"{choice.value}"' for choice in choices)
    raise SWAConfigError(f"swa.{key} must be one of {allowed}, got {value!r}")


def _checked_tokens(key: str, least: int, meaning: str, value: object) -> int:
    if not is_count(value, least):
        raise SWAConfigError(
            f"swa.{key} must be an integer >= {least} and below 2**31 (tokens {meaning}), got "
            f"{value!r}"
        )
    return value


def _checked_window(value: object) -> int | tuple[tuple[str, int], ...]:
    meaning = "a query sees, itself included"
    if not isinstance(value, Mapping):
        return _checked_tokens("window", 1, meaning, value)
    if not value:
        raise SWAConfigError(
            "swa.window is an object without layers; write layers and their windows, as in "
            f"{EXAMPLE_WINDOWS}, or a number for all layers"
        )
    return tuple(
        (str(layers), _checked_tokens(f"window[{str(layers)!r}]", 1, meaning, tokens))
        for layers, tokens in value.items()
    )


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value from JSON is a number of tokens, layers or the like; true and 4.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_TOKENS


def shown_value(value: object) -> str:
    """Show a wrong value in a message: as it is, or its type and length where that is long."""
    text = repr(value)
    if len(text) <= 80:
        return text
    length = len(value) if isinstance(value, list | tuple | dict | str) else len(text)
    return f"a {type(value).__name__} of length {length}"


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


def _parse_layer_range(part: str, spec: str, num_layers: int, key: str) -> set[int]:
    kind, _, step = part.partition("every:")
    first, last = (_parse_layer_index(text) for text in part.partition("-")[::2])
    if part == "none" and spec.strip() == "none":
        return set()
    if not kind and (stride := _parse_layer_index(step)):
        if stride > num_layers:
            raise SWAConfigError(
                f"swa.{key}={spec!r}: every:{stride} names none of this model's "
                f'{num_layers} layers; give a smaller number, or "none"'
            )
        return set(range(stride - 1, num_layers, stride))
    if (index := _parse_layer_index(part)) is not None:
        return {index}
    if first is not None and last is not None and first <= last:
        # Both ends, so that one outside of the model is found, and no range beyond the model.
        return {first, last, *range(first, min(last, num_layers))}
    raise SWAConfigError(
        f"swa.{key}={spec!r}: cannot read {part!r}; write indices and ranges "
        '("0-3,27"), "every:N" (N >= 1) or "none"'
    )


def _parse_layer_index(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _closest_option_key(key: str) -> str:
    close = get_close_matches(key.lower(), OPTION_KEYS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
