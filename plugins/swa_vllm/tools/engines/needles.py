"""Texts that mention a number once and ask for it at their end, and whether engines recall it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from vllm import LLM, SamplingParams

from swa_vllm.tools.common.filler import filler_sentences
from swa_vllm.tools.engines.forced import FORCED_TOKENS

ANSWER_TOKENS = 8  # that an answer has at most
SHORTEST = 64  # tokens of a text
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Rome", "Paris", "Boston", "Tokyo", "Berlin", "Delhi")

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Needle:
    """A text, the number that it asks for, and where that stands.

    Attributes:
        length: tokens asked for; the text has no more.
        depth: where the sentence stands: 0 at the start of the prompt, 1 at its end.
        distance: tokens from the number to the end of the text.
        num_generated: how many of its last tokens are forced as generated ones, behind the prompt.
    """

    tokens: list[int]
    number: str
    length: int
    depth: float
    distance: int
    num_generated: int = 0

    @property
    def prompt(self) -> list[int]:
        """Its tokens that are not forced as generated ones."""
        return self.tokens[: len(self.tokens) - self.num_generated]


def make_needles(
    tokenize: Tokenize,
    lengths: Sequence[int],
    num_depths: int,
    num_trials: int,
    *,
    digit_first: bool = False,
    num_generated: int = 0,
) -> list[Needle]:
    """Make texts of every length and depth, the same ones each time.

    Args:
        digit_first: the blank before the number ends the question, and does not begin the answer.
        num_generated: last tokens of each text that are not its prompt's.
    """
    blanks = (" ", "") if digit_first else ("", " ")
    generator, needles = random.Random(0), []  # noqa: S311 (the same numbers every time)
    for length in lengths:
        for step in range(num_depths):
            for _ in range(num_trials):
                city, number = generator.choice(_CITIES), str(generator.randint(1000, 9999))
                seed = generator.randrange(1 << 30)
                depth = step / (num_depths - 1)
                needles.append(
                    _make_needle(tokenize, length, depth, city, number, seed, blanks, num_generated)
                )
    return needles


def _make_needle(
    tokenize: Tokenize,
    length: int,
    depth: float,
    city: str,
    number: str,
    seed: int,
    blanks: tuple[str, str],
    num_generated: int,
) -> Needle:
    asked_with, answered_with = blanks
    question = tokenize(f" The secret number of {city} is{asked_with}")
    answer = tokenize(f"{answered_with}{number}.")
    left, hay = length - 2 * len(question) - len(answer), list[list[int]]()
    for sentence in map(tokenize, filler_sentences(seed)):
        if len(sentence) > left:
            break
        left -= len(sentence)
        hay.append(sentence)
    # As many sentences as may stand before the number for it to stand in the prompt.
    in_prompt = sum(map(len, hay)) + 2 * len(question) + len(answer) - num_generated
    ends = accumulate(map(len, hay), initial=len(question) + len(answer))
    most = sum(end <= in_prompt for end in ends) - 1
    place = round(depth * most)
    before, behind = (list(chain(*part)) for part in (hay[:place], hay[place:]))
    tokens = [*before, *question, *answer, *behind, *question]
    distance = len(tokens) - len(before) - len(question)
    return Needle(tokens, number, length, depth, distance, num_generated)


def recall(llm: LLM, tokenizer: Any, needles: Sequence[Needle]) -> list[bool]:
    """Whether the greedy answer to each text begins with its number."""
    prompts, params = [], []
    for needle in needles:
        prompts.append({"prompt_token_ids": needle.prompt})
        num_prompt = len(needle.prompt)
        forced = {FORCED_TOKENS: needle.tokens[num_prompt:]} if needle.num_generated else None
        params.append(
            SamplingParams(
                temperature=0.0,
                max_tokens=needle.num_generated + ANSWER_TOKENS,
                detokenize=False,
                extra_args=forced,
            )
        )
    outputs = llm.generate(prompts, params)  # its bar is on stderr
    answers = [
        list(output.outputs[0].token_ids)[needle.num_generated :]
        for needle, output in zip(needles, outputs, strict=True)
    ]
    return [
        tokenizer.decode(answer).strip().startswith(needle.number)
        for needle, answer in zip(needles, answers, strict=True)
    ]
