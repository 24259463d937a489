"""A row of the table of bad inputs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bad:
    """One wrong input, and what is said of it.

    Attributes:
        name: of the row.
        given: what is wrong, as the kind of the row takes it.
        got: part of the message that repeats what was given.
        allowed: part that says what may be given, or what stands against this.
        do: part that says what to do, at the least what to change.
        error: the exact class.
        cause: the class that vLLM's pydantic wraps as ``error``; None where nothing does.
        remedies: what the message tells to give instead, each as the kind of the row takes it.
    """

    name: str
    given: Any
    got: str
    allowed: str
    do: str
    error: type[BaseException] = ValueError
    cause: type[BaseException] | None = None
    remedies: tuple[Any, ...] = ()

    def check(self, error: BaseException) -> None:
        """Assert that ``error`` is what this row expects."""
        assert type(error) is self.error
        if self.cause is not None:
            assert type(error.errors()[0]["ctx"]["error"]) is self.cause  # type: ignore[attr-defined]
        self.check_text(str(error))

    def check_text(self, text: str) -> None:
        """Assert that a message has all three parts."""
        missing = [part for part in (self.got, self.allowed, self.do) if part not in text]
        assert not missing, text
