"""What the steps of ``swa check`` raise, and the remedy in a message."""

import re

_VERBS = (
    *(
        "add",
        "ask",
        "correct",
        "download",
        "give",
        "if",
        "install",
        "leave",
        "load",
        "lower",
        "merge",
    ),
    *(
        "move",
        "plan",
        "raise",
        "remove",
        "run",
        "say",
        "see",
        "serve",
        "set",
        "unset",
        "use",
        "write",
    ),
)
_REMEDY = re.compile(rf"(?:; |\. |: )(?=(?:{'|'.join(_VERBS)})\b)", re.IGNORECASE)
_UNSAID = "give what this line allows instead; no weights were loaded"


class ProblemError(Exception):
    """Something is wrong; ``remedy`` says what to do about it."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.remedy = remedy


class NotCheckedError(Exception):
    """Something cannot be checked here, for the reason given."""


def problem_of_message(text: str) -> ProblemError:
    """Split a message into what is wrong and what to do: from its first order on."""
    found = _REMEDY.search(text)
    if found is None:
        return ProblemError(text, _UNSAID)
    remedy = text[found.end() :]
    return ProblemError(text[: found.start()], remedy[0].lower() + remedy[1:])
