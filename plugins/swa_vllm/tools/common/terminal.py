"""Colours for output on a terminal."""

import os
import sys

RED, GREEN, YELLOW, BLUE, GREY = 31, 32, 33, 34, 90


def is_coloured() -> bool:
    """Say whether stdout is a terminal and ``NO_COLOR`` (https://no-color.org) is unset."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: int) -> str:
    """Put ``text`` in a colour, where output has colours."""
    return f"\033[{colour}m{text}\033[0m" if is_coloured() else text
