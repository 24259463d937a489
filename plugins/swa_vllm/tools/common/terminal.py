"""Colour, where a person looks on."""

import os
import sys

RED, GREEN, YELLOW, BLUE, GREY = 31, 32, 33, 34, 90


def is_coloured() -> bool:
    """Whether standard output is a terminal and ``NO_COLOR`` (https://no-color.org) is unset."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: int) -> str:
    """``text``, in a colour where there is any."""
    return f"\033[{colour}m{text}\033[0m" if is_coloured() else text
