"""An operator's own traffic: requests with their answers, read from JSONL and split in two."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMS = (
    'write {"prompt": "...", "answer": "..."} or {"messages": [...]} in the format of OpenAI\'s '
    "chat, whose last message is the assistant's"
)
FEWEST = 4  # conversations: two to choose by, and two whose differences make an interval


@dataclass(frozen=True)
class Request:
    """A request as it was served, in tokens.

    Attributes:
        line: where it stands in its file, from 1 on.
    """

    line: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Split:
    """Requests that choose, and requests that report; no conversation is in both."""

    choosing: tuple[Request, ...]
    held_out: tuple[Request, ...]


def read_requests(path: Path, tokenizer: Any, max_model_len: int) -> list[Request]:
    """Read requests with their answers, one a line; empty lines are skipped.

    Args:
        tokenizer: the checkpoint's, of transformers.
        max_model_len: most tokens of prompt and answer.

    Raises:
        ValueError: the file cannot be read or has no requests, or a line is none; it is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--requests {path} cannot be read: {error.strerror}; give a file that this user can "
            "read"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--requests {path} is no UTF-8: {error}; give JSONL in UTF-8") from error
    requests = []
    # By "\n" alone: JSON may hold what splitlines() takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"--requests {path}, line {number}"
            prompt, answer = _request_texts(where, line, tokenizer)
            tokens = (_tokens_of(where, text, tokenizer) for text in (prompt, answer))
            request = Request(number, *tokens)
            _check_request_length(where, request, max_model_len)
            requests.append(request)
    if not requests:
        raise ValueError(
            f"--requests {path} has no request, and {FEWEST} conversations are the fewest; "
            f"{_FORMS}, one a line"
        )
    return requests


def _request_texts(where: str, line: str, tokenizer: Any) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}; {_FORMS}") from error
    if not isinstance(record, dict) or not {"prompt", "messages"} & record.keys():
        raise ValueError(f"{where} has neither a prompt nor messages; {_FORMS}")
    if "messages" in record:
        return _chat_texts(where, record, tokenizer)
    prompt, answer = record["prompt"], record.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        kinds = " and ".join(type(value).__name__ for value in (prompt, answer))
        raise ValueError(f"{where}: prompt and answer must be texts, got {kinds}; {_FORMS}")
    if not answer:
        raise ValueError(f"{where} has no answer, and answers are what is scored; {_FORMS}")
    return prompt, answer


def _chat_texts(where: str, record: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    from jinja2 import TemplateError  # with transformers, which other commands do without

    messages = record["messages"]
    try:
        if record.get("choices"):  # a response of the API beside what was asked
            messages = [*messages, record["choices"][0]["message"]]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f'{where} has choices without a message; write "choices": [{{"message": ...}}] as '
            "OpenAI's API answers, or the answer as the last of the messages"
        ) from error
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        kind = type(messages).__name__
        raise ValueError(f"{where}: messages must be a list of objects, got {kind}; {_FORMS}")
    answer = messages[-1] if messages else {}
    if answer.get("role") != "assistant" or not (answer.get("content") or answer.get("tool_calls")):
        raise ValueError(f"{where} has no answer, and answers are what is scored; {_FORMS}")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} has messages, and the checkpoint's tokenizer has no chat template; put one "
            'beside it as chat_template.jinja, or write {"prompt": "...", "answer": "..."}'
        )

    def render(part: Sequence[Any], *, asks: bool) -> str:
        options = {"tools": record.get("tools"), "add_generation_prompt": asks}
        return str(tokenizer.apply_chat_template(list(part), tokenize=False, **options))

    try:
        prompt = render(messages[:-1], asks=True)
        whole = render(messages, asks=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the checkpoint's chat template refuses the messages: {error}; correct them, "
            "or leave the line out"
        ) from error
    end = tokenizer.special_tokens_map.get("eos_token", "")
    if not whole.startswith(prompt):  # such as a template that opens an answer's thoughts
        return prompt, f"{answer.get('content') or ''}{end}"
    # What a template writes behind the last token was never generated.
    text = whole[len(prompt) :]
    return prompt, text[: text.rindex(end) + len(end)] if end and end in text else text


def _tokens_of(where: str, text: str, tokenizer: Any) -> tuple[int, ...]:
    try:
        text.encode()  # JSON may spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is no text of Unicode: {error.reason}; correct it, or leave the line out"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_request_length(where: str, request: Request, max_model_len: int) -> None:
    if not request.prompt or not request.answer:
        raise ValueError(
            f"{where}: prompt and answer must have a token each, got {len(request.prompt)} and "
            f"{len(request.answer)}; leave the line out"
        )
    if len(request.tokens) > max_model_len:
        raise ValueError(
            f"{where} has {len(request.tokens)} tokens, prompt and answer together, and the model "
            f"was made for {max_model_len}; leave the line out"
        )


def split_requests(requests: Sequence[Request], seed: int) -> Split:
    """Hold out half of the conversations, at random but the same ones for the same seed.

    A request whose prompt begins with the whole prompt of another is a later turn of it, and stays
    with it: otherwise what reports had been read while choosing.

    Raises:
        ValueError: there are too few to hold any out.
    """
    conversations = list(_conversations(requests))
    if len(conversations) < FEWEST:
        raise ValueError(
            f"--requests has {len(requests)} requests of {len(conversations)} conversations, and "
            f"{FEWEST} are the fewest of which some can be held out; give more (100 and more make "
            "the interval narrow)"
        )
    random.Random(seed).shuffle(conversations)  # noqa: S311 (the same split every time)
    half = len(conversations) // 2
    parts = conversations[half:], conversations[:half]
    return Split(*(tuple(request for group in part for request in group) for part in parts))


def _conversations(requests: Sequence[Request]) -> Iterator[list[Request]]:
    group = list[Request]()
    # Sorted, a prompt stands directly before those that begin with it.
    for request in sorted(requests, key=lambda request: (request.prompt, request.line)):
        if group and request.prompt[: len(group[0].prompt)] != group[0].prompt:
            yield group
            group = []
        group.append(request)
    if group:
        yield group
