"""Made-up prose, for evaluations that are given no text."""

import random
from collections.abc import Iterator

_WHO = ("The baker", "A tired clerk", "My neighbour", "The young captain", "Her brother", "A guest")
_DID = ("walked to", "wrote about", "looked for", "remembered", "drew a map of", "came back from")
_WHERE = ("the harbour", "the old mill", "the market", "a quiet garden", "the station", "the hills")
_WHEN = ("before sunrise", "in the rain", "on a Sunday", "without a word", "after supper", "again")


def filler_sentences(seed: int) -> Iterator[str]:
    """Make sentences without end, each with a blank before it; the same for the same seed."""
    generator = random.Random(seed)  # noqa: S311 (the same text every time)
    while True:
        words = (generator.choice(part) for part in (_WHO, _DID, _WHERE, _WHEN))
        yield f" {' '.join(words)}."
