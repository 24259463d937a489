"""Texts of the evaluations: a file's tokens, and pieces of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def tokenizer_of(model: str) -> Any:
    """Load the checkpoint's tokenizer.

    Raises:
        ValueError: it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model}: {error}") from error


def tokens_of(model: str, path: Path) -> list[int]:
    """Read a UTF-8 text as tokens, without those that a tokenizer would add.

    Raises:
        ValueError: the text cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--text {path} cannot be read: {error.strerror}; give a text file that this user can "
            "read"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {path} is no UTF-8: {error}; give a text file in UTF-8"
        ) from error
    return list(tokenizer_of(model)(text, add_special_tokens=False)["input_ids"])


def cut_evaluated_text(
    tokens: Sequence[int], length: int, max_pieces: int | None = None
) -> list[list[int]]:
    """Cut a text into whole pieces of ``length`` tokens; what is left over is dropped.

    Raises:
        ValueError: it does not fill a single piece.
    """
    if length < 2:
        raise ValueError(f"--length must be at least 2 tokens, got {length}")
    pieces = [list(tokens[i : i + length]) for i in range(0, len(tokens) - length + 1, length)]
    if not pieces:
        raise ValueError(
            f"the text has {len(tokens)} tokens, less than one piece of {length}: give a longer "
            "text, or a smaller --length"
        )
    return pieces[:max_pieces]
