"""What the tools refuse of a command line before they measure anything."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from swa_backend.config import MOST_TOKENS


def check_numbers(args: argparse.Namespace, names: Iterable[str], least: int = 1) -> None:
    """Raise ValueError for the first option of these that is given and out of range."""
    for name in names:
        check_number(name, getattr(args, name), least)


def check_number(name: str, value: int | None, least: int = 1) -> None:
    """Raise ValueError if the option ``name`` is given and below ``least``, or 2**31 or more."""
    if value is not None and not least <= value <= MOST_TOKENS:
        raise ValueError(
            f"--{name.replace('_', '-')} must be at least {least} and below 2**31, got {value}"
        )


def check_output(flag: str, path: Path) -> None:
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


def is_number(text: str, least: int) -> bool:
    """Whether an item of a list of numbers is one, from ``least`` on and below 10**9."""
    text = text.strip()
    return text.isdecimal() and len(text) < 10 and int(text) >= least


def numbers_of_tokens(flag: str, text: str) -> list[int]:
    """Items of a list such as ``2048,4096``.

    Raises:
        ValueError: it is none.
    """
    parts = text.split(",")
    if not all(is_number(part, 1) for part in parts):
        raise ValueError(
            f"{flag} {text!r}: write numbers of tokens from 1 on with commas between them"
        )
    return [int(part) for part in parts]


def told_by(error: Exception) -> str:
    """What an error says, without what pydantic puts around those raised while vLLM is set up."""
    if hasattr(error, "errors"):
        (first, *_) = error.errors()
        return str(first.get("ctx", {}).get("error", error))
    return str(error)
