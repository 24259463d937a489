"""The parser of every verb: what it says of an unknown flag, and how it shows a default."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help texts with the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        is_flag = default is None or default is False or default in ("", argparse.SUPPRESS)
        is_said = is_flag or "default" in text or f"({default})" in text
        return text if is_said else f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and names the flag that an unknown one is near to."""

    def __init__(self, **keywords: object) -> None:
        defaults = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **keywords})  # type: ignore[arg-type]
        self.set_defaults(parser=self)  # that of the innermost verb wins

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """End with status 2, and say which flag was probably meant."""
        flag = next((part for part in unknown if part.startswith("--")), unknown[0])
        known = re.findall(r"--[a-z-]+", self.format_usage())
        close = get_close_matches(flag.partition("=")[0], known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else "; --help lists what there is"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
