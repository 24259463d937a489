"""Options that several verbs have, and what is refused of a command line at once."""

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swa_backend.options import EXAMPLE_WINDOWS, MOST_TOKENS, SWAConfigError, shown_value
from swa_backend.window import Phase
from swa_vllm.config.additional_config import parse_additional_config

_WINDOW = "tokens that a sliding layer sees, the newest included"

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's options that decide what slides."""
    parser.add_argument(
        "--window",
        type=_window_argument,
        metavar="TOKENS",
        help=f"{_WINDOW}, or windows by layer, as '{EXAMPLE_WINDOWS}' (default: the checkpoint's)",
    )
    add_sink_tokens_argument(parser, 0)
    parser.add_argument(
        "--phase",
        choices=[phase.value for phase in Phase],
        help="whose tokens have the window: the prompt's, the answer's or both (default: both)",
    )
    add_full_attention_layers_argument(parser)


def add_window_size_argument(
    parser: argparse.ArgumentParser, default: int | None, without: str | None = None
) -> None:
    """Add ``--window`` of a verb that takes one number; ``without`` says what happens without."""
    text = _WINDOW if without is None else f"{_WINDOW} (default: {without})"
    parser.add_argument("--window", type=int, default=default, metavar="TOKENS", help=text)


def add_full_attention_layers_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--full-attention-layers``."""
    parser.add_argument(
        "--full-attention-layers",
        metavar="LAYERS",
        help='layers that keep full attention, such as "0-3,27", "every:4" (layers 3, 7, ...) or '
        '"none" (default: the checkpoint\'s)',
    )


def add_sink_tokens_argument(parser: argparse.ArgumentParser, default: int) -> None:
    """Add ``--sink-tokens``."""
    parser.add_argument(
        "--sink-tokens",
        type=int,
        default=default,
        metavar="TOKENS",
        help="first tokens of a text that sliding layers always see",
    )


def add_additional_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add vLLM's ``--additional-config``, whose section ``swa`` has the options of windows."""
    parser.add_argument(
        "--additional-config",
        default="{}",
        metavar="JSON",
        help="""as vLLM takes it, such as '{"swa": {"window": 4096}}' (default: {})""",
    )


def json_object_of_flag(flag: str, text: str, example: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{flag} must be a JSON object, got {shown_value(text)}; give one such as '{example}'"
        )
    return found


def additional_config_of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Merge ``--additional-config`` with the flags of windows.

    Raises:
        ValueError: an option is wrong, or given in both.
    """
    example = '{"swa": {"window": 4096}}'
    additional = json_object_of_flag("--additional-config", args.additional_config, example)
    flags = options_of_window_arguments(args)
    section = additional.get("swa", {})
    if isinstance(section, dict):
        if twice := [name for name in flags if name in section]:
            raise ValueError(
                f"--{twice[0].replace('_', '-')} is given, and {twice[0]!r} in --additional-config "
                "too; remove either"
            )
        section = {**section, **flags}
    merged = {**additional, "swa": section} if flags or "swa" in additional else additional
    try:
        parse_additional_config(merged)
    except SWAConfigError as error:
        # A message has the words of what was given.
        text = str(error) if additional else options_as_flags(str(error))
        raise ValueError(text) from error
    return merged


def _window_argument(text: str) -> int | dict[str, Any]:
    """Read a number, or a JSON object whose values the option's own check looks at."""
    try:
        window = json.loads(text)
    except json.JSONDecodeError:
        window = None
    if isinstance(window, dict) or (isinstance(window, int) and not isinstance(window, bool)):
        return window
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a number nor an object such as '{EXAMPLE_WINDOWS}'"
    )


def options_of_window_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Spell the ``swa`` options that the arguments mean."""
    given = {name: getattr(args, name) for name in ("window", "phase", "full_attention_layers")}
    options = {name: value for name, value in given.items() if value is not None}
    return {**options, **({"sink_tokens": args.sink_tokens} if args.sink_tokens else {})}


def add_phase_argument(
    parser: argparse.ArgumentParser, whose: str = "whose tokens have the window"
) -> None:
    """Add ``--phase``; ``whose`` says what it decides."""
    parser.add_argument(
        "--phase",
        choices=[phase.value for phase in Phase],
        default=Phase.BOTH.value,
        help=f"{whose} (default: both)",
    )


def options_of_phase(args: argparse.Namespace) -> dict[str, Any]:
    """Spell the ``swa`` option that ``--phase`` means: none where both phases have the window."""
    return {} if args.phase == Phase.BOTH else {"phase": args.phase}


def refuse_phase_decode(args: argparse.Namespace, reason: str, remedy: str) -> None:
    """Raise ValueError for ``--phase decode`` in a command that has nothing to say of it."""
    if args.phase == Phase.DECODE:
        raise ValueError(f"--phase {args.phase} {reason}; {remedy}")


def options_as_flags(text: str) -> str:
    """Name the options of a window in a message as :func:`add_window_arguments` has them."""

    def flags(found: re.Match[str]) -> str:
        options = json.loads(found[1])["swa"]
        if "enabled" in options:
            return '"enabled": false among the options of the engine'
        return " ".join(
            f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in options.items()
        )

    text = re.sub(r"--additional-config '(\{.*?\})'(?!\w)", flags, text)
    return re.sub(
        r"\b(?:swa\.)?(sink_tokens|full_attention_layers)\b|\bswa\.(window|phase)\b",
        lambda found: f"--{(found[1] or found[2]).replace('_', '-')}",
        text,
    )


def parse_memory(text: str) -> int:
    """Read a size such as ``16GiB``; returns bytes.

    Raises:
        ValueError: the text is no number with a unit.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([KMG]i?B)", text)
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if not 0 < size < 2**63:
        raise ValueError(
            f"--kv-memory {text!r}: write a number and a unit ({', '.join(_UNITS)}), such as 16GiB"
        )
    return size


def check_number_arguments(args: argparse.Namespace, names: Iterable[str], least: int = 1) -> None:
    """Raise ValueError for the first option of these that is given and out of range."""
    for name in names:
        check_number_argument(name, getattr(args, name), least)


def check_number_argument(name: str, value: int | None, least: int = 1) -> None:
    """Raise ValueError if the option ``name`` is given and below ``least``, or 2**31 or more."""
    if value is not None and not least <= value <= MOST_TOKENS:
        raise ValueError(
            f"--{name.replace('_', '-')} must be at least {least} and below 2**31, got {value}"
        )


def check_output_path(flag: str, path: Path) -> None:
    """Raise ValueError unless this user can write a file ``path``."""
    try:
        if path.is_dir():
            raise ValueError(f"{flag} {path} is a directory; give the name of a file in it")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{flag} {path}: the directory does not exist; make it first")
        can_write = os.access(
            path if path.exists() else path.absolute().parent, os.W_OK, effective_ids=True
        )
    except PermissionError:
        can_write = False
    if not can_write:
        raise ValueError(f"{flag} {path}: this user cannot write there; name another place")


def is_flag_number(text: str, least: int) -> bool:
    """Say whether an item of a list is a number, from ``least`` on and below 10**9."""
    text = text.strip()
    return text.isdecimal() and len(text) < 10 and int(text) >= least


def numbers_of_tokens(flag: str, text: str) -> list[int]:
    """Read a list of numbers of tokens, such as ``2048,4096``.

    Raises:
        ValueError: an item is no such number.
    """
    parts = text.split(",")
    if not all(is_flag_number(part, 1) for part in parts):
        raise ValueError(
            f"{flag} {text!r}: write numbers of tokens from 1 on with commas between them"
        )
    return [int(part) for part in parts]


def error_text(error: Exception) -> str:
    """Unwrap what an error says: pydantic puts text around those raised while vLLM is set up."""
    if hasattr(error, "errors"):
        (first, *_) = error.errors()
        return str(first.get("ctx", {}).get("error", error))
    return str(error)
