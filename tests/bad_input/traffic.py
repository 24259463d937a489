"""Traffic and limits that ``swa tune`` cannot tune by, and what it says."""

import json
from dataclasses import dataclass, replace
from typing import Any

from tests.bad_input.commands import HERE
from tests.bad_input.row import Bad

# A turn of it for each request, so that no prompt begins with another.
_SENTENCE = "the quick brown fox jumps over a lazy dog and goes home again to sleep until noon "


def _line(number: int, length: int = 300) -> str:
    """Write a request of its own, with a prompt of so many characters."""
    turned = _SENTENCE[number:] + _SENTENCE[:number]
    prompt = (turned * (length // len(turned) + 1))[:length]
    return json.dumps({"prompt": prompt, "answer": f" {number}{turned * 2}"})


RIGHT_LINES = [_line(number) for number in range(8)]
RIGHT = "\n".join(RIGHT_LINES)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSING = "{{ raise_exception('a system prompt is needed') }}"
_ASKED, _ANSWERED = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Paul."}


@dataclass(frozen=True)
class Traffic:
    """What a row gives ``swa tune``.

    Attributes:
        text: of the file of requests; None for no file.
        limit: what is to be kept to.
        template: the checkpoint's chat template; None for none.
    """

    text: str | bytes | None = RIGHT
    limit: tuple[str, ...] = ("--budget", "0.5")
    more: tuple[str, ...] = ()
    template: str | None = None


def _text(name: str, text: str | bytes | None, got: str, allowed: str, do: str) -> Bad:
    """A file whose remedy is one of right requests."""
    return Bad(name, Traffic(text), got, allowed, do, remedies=(Traffic(),))


def _second(name: str, line: str, got: str, allowed: str, do: str) -> Bad:
    """A wrong line behind a right one; the remedies are to leave it out, and to write it right."""
    text = "\n".join([RIGHT_LINES[0], line, *RIGHT_LINES[1:]])
    return _text(name, text, got, allowed, do)


def _chat(name: str, record: dict[str, Any], got: str, allowed: str, do: str) -> Bad:
    """A wrong chat behind right requests, and the same chat with its answer."""
    lines = "\n".join(RIGHT_LINES)
    given, right = ({"messages": [_ASKED, _ANSWERED]} | record), {"messages": [_ASKED, _ANSWERED]}
    return Bad(
        name,
        Traffic(f"{lines}\n{json.dumps(given)}", template=TEMPLATE),
        f"line 9{got}",
        allowed,
        do,
        remedies=(Traffic(f"{lines}\n{json.dumps(right)}", template=TEMPLATE),),
    )


def _limit(name: str, limit: tuple[str, ...], got: str, allowed: str, do: str, *fixed: str) -> Bad:
    """A limit that cannot be kept to, and one that can."""
    remedy = Traffic(limit=fixed or ("--budget", "0.5"))
    error = SystemExit if "usage" in do else ValueError
    return Bad(name, Traffic(limit=limit), got, allowed, do, error, remedies=(remedy,))


def _more(more: tuple[str, ...], got: str, allowed: str, do: str, *fixed: str) -> Bad:
    """An option that makes no sense, and a right value of it."""
    given = Traffic(more=more)
    remedy = replace(given, more=fixed)
    return Bad(" ".join(more), given, got, allowed, do, remedies=(remedy,))


_FORM = '{"prompt": "...", "answer": "..."} or {"messages": [...]}'
_CHATS = json.dumps({"messages": [_ASKED, _ANSWERED]})
TRAFFIC = [
    _text("empty file", "", "has no request", "4 conversations are the fewest", f"write {_FORM}"),
    _text("empty lines", "\n \n", "has no request", "4 conversations are", f"write {_FORM}"),
    _text("no file", None, "cannot be read: No such file", "a file that this user can", "give a"),
    _text("no UTF-8", b"\xff", "is no UTF-8: 'utf-8' codec can't", "JSONL in UTF-8", "give"),
    _second("no JSON", "{oops", "line 2 is no JSON: Expecting property", _FORM, "write"),
    _second("a list", "[1]", "line 2 has neither a prompt nor messages", _FORM, "write"),
    _second("other keys", '{"text": "x"}', "line 2 has neither a prompt nor", _FORM, "write"),
    _second(
        "prompt of numbers",
        '{"prompt": [3], "answer": "x"}',
        "line 2: prompt and answer must be texts, got list and str",
        _FORM,
        "write",
    ),
    _second(
        "answer of numbers",
        '{"prompt": "x", "answer": 3}',
        "line 2: prompt and answer must be texts, got str and int",
        _FORM,
        "write",
    ),
    _second("no answer", '{"prompt": "x"}', "line 2 has no answer", "what is scored", "write"),
    _second(
        "empty answer",
        '{"prompt": "x", "answer": ""}',
        "line 2 has no answer",
        "answers are what is scored",
        "write",
    ),
    _second(
        "empty prompt",
        '{"prompt": "", "answer": "x"}',
        "got 0 and 1",
        "line 2: prompt and answer must have a token each",
        "leave the line out",
    ),
    _second(
        "half of a surrogate pair",
        '{"prompt": "\\ud800", "answer": "x"}',
        "line 2 is no text of Unicode",
        "surrogates not allowed",
        "leave the line out",
    ),
    _second(
        "longer than the model",
        _line(3, 3500),
        "tokens, prompt and answer together",
        "the model was made for 512",
        "leave the line out",
    ),
    _chat(
        "messages that are no list",
        {"messages": "Who?"},
        ": messages must be a list of objects, got str",
        _FORM,
        "write",
    ),
    _chat("no message", {"messages": []}, " has no answer", "are what is scored", "whose last"),
    _chat(
        "a chat without an answer",
        {"messages": [_ASKED]},
        " has no answer",
        "answers are what is scored",
        "whose last message is the assistant's",
    ),
    _chat(
        "choices without a message",
        {"messages": [_ASKED], "choices": [{"text": "Paul."}]},
        " has choices without a message",
        "as OpenAI's API answers",
        'write "choices"',
    ),
    _chat(
        "choices that are no list",
        {"choices": {"message": _ANSWERED}},
        " has choices without a message",
        "as OpenAI's API answers",
        "or the answer as the last of the messages",
    ),
    Bad(
        "no chat template",
        Traffic("\n".join([_CHATS, *RIGHT_LINES])),
        "line 1 has messages",
        "has no chat template",
        'put one beside it as chat_template.jinja, or write {"prompt"',
        remedies=(Traffic("\n".join([_CHATS, *RIGHT_LINES]), template=TEMPLATE), Traffic()),
    ),
    Bad(
        "a chat template that refuses",
        Traffic("\n".join([*RIGHT_LINES, _CHATS]), template=REFUSING),
        "line 9: the checkpoint's chat template refuses the messages",
        "a system prompt is needed",
        "or leave the line out",
        remedies=(Traffic(RIGHT, template=REFUSING),),
    ),
    _text(
        "too few to hold any out",
        "\n".join(RIGHT_LINES[:3]),
        "has 3 requests of 3 conversations",
        "4 are the fewest",
        "give more",
    ),
    _text(
        "one conversation",
        "\n".join([RIGHT_LINES[0]] * 8),
        "has 8 requests of 1 conversations",
        "4 are the fewest",
        "give more",
    ),
    _limit("no limit", (), "one of the arguments", "--budget --kv-memory is required", "usage"),
    _limit(
        "two limits",
        ("--budget", "0.5", "--kv-memory", "1GiB"),
        "argument --kv-memory",
        "not allowed with argument --budget",
        "usage",
        *("--kv-memory", "1GiB"),
    ),
    *(
        _limit(
            f"budget {budget}",
            ("--budget", budget),
            f"got {float(budget)}",
            "between 0 and 1",
            "--budget is a part of full attention's bytes",
        )
        for budget in ("0", "1", "-0.5", "nan", "inf")
    ),
    _limit(
        "a budget below any window",
        ("--budget", "0.01"),
        "no window with --phase both keeps a request of",
        "bytes of full attention's",
        "give a greater --budget",
    ),
    _limit(
        "memory without a unit",
        ("--kv-memory", "16"),
        "--kv-memory '16'",
        "a number and a unit",
        "write",
        *("--kv-memory", "16MiB"),
    ),
    _limit(
        "memory below a page",
        ("--kv-memory", "1KiB"),
        "--kv-memory 1KiB",
        "does not hold a single page of",
        "give more",
        *("--kv-memory", "16MiB"),
    ),
    Bad(
        "the least loss without a budget",
        Traffic(limit=("--kv-memory", "1GiB", "--objective", "loss")),
        "--objective loss without a budget",
        "is full attention",
        "give --budget, or another --objective",
        remedies=(
            Traffic(limit=("--budget", "0.5", "--objective", "loss")),
            Traffic(limit=("--kv-memory", "1GiB", "--objective", "ttft")),
        ),
    ),
    _limit(
        "a window in prompts, for memory",
        ("--kv-memory", "16MiB", "--phase", "both,prefill"),
        "--phase prefill with --kv-memory and --objective throughput",
        "gains time to the first token alone",
        "give --kv-memory and --objective ttft, or leave prefill out",
        *("--kv-memory", "16MiB", "--phase", "both,prefill", "--objective", "ttft"),
    ),
    _limit(
        "a window in prompts, within a budget",
        ("--budget", "0.5", "--phase", "prefill", "--objective", "ttft"),
        "--phase prefill with --budget 0.5 and --objective ttft",
        "keeps every page",
        "give --kv-memory and --objective ttft, or leave prefill out",
        *("--kv-memory", "16MiB", "--phase", "prefill", "--objective", "ttft"),
    ),
    _limit(
        "a window in answers, for the first token",
        ("--kv-memory", "16MiB", "--phase", "both,decode", "--objective", "ttft"),
        "--phase decode with --objective ttft",
        "gains memory alone",
        "give --objective throughput or memory, or leave decode out",
        *("--kv-memory", "16MiB", "--phase", "both,decode", "--objective", "memory"),
    ),
    *(
        _more(
            ("--phase", phases),
            f"--phase {phases!r}",
            "write both, prefill, decode",
            "or several with commas between them",
            *("--phase", "both,decode"),
        )
        for phases in ("", "both,answers", "both;decode")
    ),
    *(
        _more(
            ("--tolerance", tolerance),
            f"got {float(tolerance)}",
            "from 0 on and below 1",
            "--tolerance is a growth",
            *("--tolerance", "0"),
        )
        for tolerance in ("-1", "1", "nan")
    ),
    *(
        _more(
            ("--sink-tokens", sinks),
            f"--sink-tokens {sinks!r}",
            "numbers from 0 on",
            "with commas between them",
            *("--sink-tokens", "0,4"),
        )
        for sinks in ("4,x", "", "-1", "9999999999")
    ),
    *(
        _more(
            ("--time", time), f"--time {time!r}", "a number and s, m or h", "write", "--time", "9s"
        )
        for time in ("soon", "0s", "30", "1.5h")
    ),
    *(
        _more((flag, value), f"got {value}", f"must be at least {least}", flag, flag, str(least))
        for flag, value, least in (
            ("--max-num-batched-tokens", "0", 1),
            ("--seed", "-1", 0),
        )
    ),
    _more(("--block-size", "0"), "got 0", "at least 1", "--block-size must", "--block-size", "16"),
    _more(
        ("--plot", "a.jpg"), "--plot a.jpg", "is a PNG", "ends in .png", "--plot", f"{HERE}/a.png"
    ),
    _more(
        ("--resume", "/nowhere/file"),
        "--resume /nowhere/file",
        "the directory does not exist",
        "make it first",
        *("--resume", f"{HERE}/scores"),
    ),
    *(
        Bad(
            f"scores {name}",
            Traffic(more=("--resume", f"{HERE}/{name}")),
            got,
            allowed,
            "give the path of a new file, or remove this one",
            remedies=(Traffic(more=("--resume", f"{HERE}/new")),),
        )
        for name, got, allowed in (
            ("of-another-run", "is of another run", "it differs in block_size, config.json"),
            ("of-nothing", "is no file of swa tune", "Expecting property name"),
        )
    ),
]
SCORES = {"of-another-run": '{"model": "other"}\n', "of-nothing": "{oops"}
