"""Texts of the evaluations: tokens of a file, pieces of them."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer


def tokenizer_of(model: str) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model}: {error}") from error


def tokens_of(model: str, path: Path) -> list[int]:
    """Tokens of a UTF-8 text, without those that a tokenizer would add.

    Raises:
        ValueError: the text cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is no UTF-8: {error}") from error
    return list(tokenizer_of(model)(text, add_special_tokens=False)["input_ids"])


def cut(tokens: Sequence[int], length: int, max_pieces: int | None = None) -> list[list[int]]:
    """Whole pieces of ``length`` tokens; what is left over is dropped.

    Raises:
        ValueError: not a single piece.
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


def progress(items: Sequence[Any], unit: str) -> Iterable[Any]:
    """``items``, with a bar on stderr."""
    return tqdm(items, unit=f" {unit}", file=sys.stderr, leave=False, disable=None)


@contextmanager
def token_bar(num_tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, moved by calls with the number of tokens done so far."""
    with tqdm(total=num_tokens, unit=" tokens", file=sys.stderr, leave=False, disable=None) as bar:
        yield lambda num_done: bar.update(num_done - bar.n)
