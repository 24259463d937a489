"""What a tool tells on stderr while it works; figures go to stdout."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def say(text: str, *, is_result: bool = False) -> None:
    """Tell on stderr what is done next, or what came of it."""
    print(text if is_result else f"{text} ...", file=sys.stderr, flush=True)


@contextmanager
def say_if_slow(text: str, after_s: float = 1.0) -> Iterator[None]:
    """Within, tell ``text`` once ``after_s`` seconds have passed."""
    timer = threading.Timer(after_s, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(items: Sequence[Any], unit: str) -> Iterable[Any]:
    """Iterate over ``items`` with a bar on stderr."""
    from tqdm import tqdm  # comes with vLLM, which not every command needs

    return tqdm(items, unit=f" {unit}", file=sys.stderr, leave=False, disable=None)


@contextmanager
def token_bar(num_tokens: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr; the function yielded sets it to the number of tokens done so far."""
    from tqdm import tqdm

    with tqdm(total=num_tokens, unit=" tokens", file=sys.stderr, leave=False, disable=None) as bar:
        yield lambda num_done: bar.update(num_done - bar.n)
