"""HTTP requests that a server refuses, and what vLLM, whose messages these are, says of them.

``given`` is the path below ``/v1/``, the body (keys beside those of a good request, or bytes), and
the status. Where vLLM says less than it could, a row's three parts are one.

A remedy is a pair: the keys to send instead, and the arguments with which the server is to be
started, none as a rule. A body that is no JSON object has none: what to send instead is not said.
"""

from typing import Any

from tests.bad_input.row import Bad

EMBEDS = "embeds"  # stands for the embeddings of a prompt, whose size is the model's
_TOOLS = [{"type": "function", "function": {"name": "f"}}]


_SAYS_HELLO = [{"role": "user", "content": "Hello"}]
# A right value of each key.
_RIGHT: dict[str, Any] = {
    "model": "demo",
    "prompt": "The sea is",
    "max_tokens": 5,
    "min_tokens": 1,
    "n": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 1,
    "logprobs": 5,
    "prompt_logprobs": 5,
    "seed": 7,
    "stop": "sea",
    "stop_token_ids": [5],
    "logit_bias": {"5": 1},
    "allowed_token_ids": [5, 6],
    "bad_words": ["sea"],
    "truncate_prompt_tokens": 3,
    "response_format": {"type": "text"},
    "messages": _SAYS_HELLO,
    "tools": _TOOLS,
    "tool_choice": "auto",
    "reasoning_effort": "low",
}


def _row(path: str, name: str, body: Any, status: int, *parts: str, remedies: Any = ()) -> Bad:
    got, allowed, do = (*parts, *[parts[-1]] * 3)[:3]
    return Bad(name, (path, body, status), got, allowed, do, remedies=remedies)


def _keys(
    path: str, name: str, keys: dict[str, Any], status: int, parts: tuple[str, ...], remedies: Any
) -> Bad:
    """A row whose keys are to have right values, unless ``remedies`` say something else."""
    if remedies is None:
        remedies = (({key: _RIGHT[key] for key in keys}, ()),)
    return _row(path, name, keys, status, *parts, remedies=remedies)


def _shown(keys: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in keys.items())[:60]


def _completion(
    keys: dict[str, Any], *parts: str, name: str = "", status: int = 400, remedies: Any = None
) -> Bad:
    return _keys("completions", name or _shown(keys), keys, status, parts, remedies)


def _chat(keys: dict[str, Any], *parts: str, name: str = "", remedies: Any = None) -> Bad:
    name = f"chat: {name or _shown(keys)}"
    return _keys("chat/completions", name, keys, 400, parts, remedies)


def _bytes(name: str, body: bytes, *parts: str) -> Bad:
    return _row("completions", name, body, 400, *parts)


def _says(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


_NO_PROMPT = (
    "Either prompt or prompt_embeds",
    "must be provided and non-empty",
    "(parameter=prompt)",
)
_TEMPLATE = ("Chat template is passed", "--trust-request-chat-template is not set", "Refused")
_PARSING = "There was an error parsing the body"

_BODIES = [
    _bytes("no JSON", b"{", "JSON decode error", "Expecting property name", "in double quotes"),
    _bytes("empty", b"", "'input': 'None'", "Field required", "'loc': 'body'"),
    _bytes("null", b"null", "'input': 'None'", "Field required", "'loc': 'body'"),
    _bytes("a list", b"[]", "'<list of 0 items>'", "a valid dictionary", "Input should be"),
    _bytes("no UTF-8", b'{"prompt": "\xff\xfe"}', _PARSING),
    _bytes("nested too deep", b'{"prompt": ' + b"[" * 10000 + b"]" * 10000 + b"}", _PARSING),
    _bytes(
        "half of a character",
        b'{"model": "demo", "prompt": "\\ud800", "max_tokens": 2}',
        "TextEncodeInput must be",
    ),
    _bytes(
        "temperature=NaN",
        b'{"model": "demo", "prompt": "a", "temperature": NaN}',
        "got nan",
        "must be a finite number",
        "temperature must",
    ),
    _row("nosuch", "no such path", {}, 404, "Not Found"),
]

_COMPLETIONS = [
    _completion({"model": "other"}, "`other` does not exist", "Valid aliases: demo", status=404),
    _completion({"prompt": None}, *_NO_PROMPT),
    _completion({"prompt": ""}, *_NO_PROMPT),
    _completion({"prompt": []}, "You must pass at least one prompt"),
    _completion({"prompt": {"a": 1}}, "'<dict of 1 items>'", "should be a valid", "body.prompt"),
    _completion({"prompt": 5}, "'input': '5'", "should be a valid string", "body.prompt"),
    _completion(
        {"prompt": [-1, 5]}, "'input': '-1'", "greater than or equal to 0", "body.prompt.0"
    ),
    _completion({"prompt": [10**8]}, "Token id 100000000", "is out of vocabulary"),
    _completion({"prompt": [2**70]}, f"Token id {2**70}", "is out of vocabulary"),
    _completion(
        {"prompt": "word " * 20000},
        "your prompt contains",
        "maximum context length",
        "Please reduce the length",
        name="a prompt that is too long",
    ),
    _completion(
        {"prompt": [5] * 5000},
        "your prompt contains 5000 input tokens",
        "maximum context length",
        "Please reduce the length",
        name="too many tokens",
    ),
    *(
        _completion(
            {"max_tokens": number},
            f"max_tokens={number}",
            "cannot be greater than max_model_len",
            "Please request fewer",
        )
        for number in (10**6, 2**70)
    ),
    *(
        _completion(
            {"max_tokens": number}, f"got {number}", "must be at least 1", "max_tokens must"
        )
        for number in (0, -1)
    ),
    _completion({"max_tokens": "many"}, "'input': 'many'", "a valid integer", "body.max_tokens"),
    _completion({"max_tokens": 2.5}, "'input': '2.5'", "a valid integer", "body.max_tokens"),
    _completion(
        {"min_tokens": 50, "max_tokens": 5}, "got 50", "equal to max_tokens=5", "min_tokens"
    ),
    _completion({"n": 0}, "got 0", "n must be at least 1"),
    _completion({"n": 10**9}, "got 1000000000", "n must be at most", "To increase this limit, set"),
    _completion(
        {"n": 2},
        "got 2",
        "n must be 1 when using greedy sampling",
        remedies=(({"n": 1}, ()), ({"n": 2, "temperature": 1}, ())),
    ),
    _completion({"temperature": -1}, "got -1.0", "must be non-negative", "temperature must"),
    _completion({"temperature": "hot"}, "'input': 'hot'", "a valid number", "body.temperature"),
    _completion({"top_p": 2}, "got 2.0", "must be in (0, 1]", "top_p must"),
    _completion({"top_p": 0}, "got 0.0", "must be in (0, 1]", "top_p must"),
    _completion({"top_k": -5}, "got -5", "must be 0 (disable), or at least 1", "top_k must"),
    _completion({"min_p": 2}, "got 2.0", "must be in [0, 1]", "min_p must"),
    _completion(
        {"repetition_penalty": 0}, "got 0.0", "greater than zero", "repetition_penalty must"
    ),
    _completion({"presence_penalty": 9}, "got 9.0", "must be in [-2, 2]", "presence_penalty must"),
    _completion({"logprobs": 10000}, "logprobs of 10000", "max allowed: 20", "parameter=logprobs"),
    _completion({"logprobs": -2}, "value=-2", "must be a positive value or -1", "`logprobs`"),
    _completion({"logprobs": "all"}, "value=all", "must be an integer", "`logprobs`"),
    _completion({"prompt_logprobs": 10**6}, "logprobs of 1000000", "max allowed: 20", "prompt_log"),
    _completion({"seed": 2**70}, str(2**70), "less than or equal to", "body.seed"),
    _completion({"stop": 5}, "'input': '5'", "should be a valid string", "body.stop"),
    _completion(
        {"stop_token_ids": ["a"]}, "'input': 'a'", "a valid integer", "body.stop_token_ids"
    ),
    _completion({"logit_bias": {"a": 1}}, "['a']", "cannot be converted to integer", "logit_bias"),
    _completion({"logit_bias": {"99999999": 1}}, "[99999999]", "Vocabulary size", "in logit_bias"),
    _completion(
        {"allowed_token_ids": [10**9]}, "[1000000000]", "out-of-vocab", "allowed_token_ids"
    ),
    _completion({"bad_words": [""]}, "bad_words=['']", "cannot contain an empty string"),
    _completion(
        {"stream_options": {"include_usage": True}},
        "Stream options",
        "`stream=True`",
        "be defined",
        remedies=(({"stream_options": {"include_usage": True}, "stream": True}, ()),),
    ),
    _completion(
        {"truncate_prompt_tokens": 10**6},
        "truncate_prompt_tokens=1000000",
        "cannot be greater than max_model_len",
        "Please request a smaller",
    ),
    _completion(
        {"structured_outputs": {"regex": "("}},
        'regex "("',
        "unclosed group",
        "Grammar error",
        remedies=(({"structured_outputs": {"regex": "(a)"}}, ()),),
    ),
    _completion(
        {"structured_outputs": {"json": {"type": "x"}}},
        "type: x",
        "Invalid",
        "Grammar error",
        remedies=(({"structured_outputs": {"json": {"type": "object"}}}, ()),),
    ),
    _completion(
        {"structured_outputs": {"grammar": "root ::= ("}},
        "'root ::= ('",
        "Expected ')'",
        "Invalid grammar specification",
        remedies=(({"structured_outputs": {"grammar": 'root ::= ("a")'}}, ()),),
    ),
    _completion(
        {"response_format": {"type": "x"}}, "'input': 'x'", "Input should be 'text'", "type"
    ),
    _completion(
        {"prompt_embeds": "AAAA"},
        "`prompt_embeds`",
        "--enable-prompt-embeds",
        "You must set",
        remedies=(({"prompt_embeds": EMBEDS}, ("--enable-prompt-embeds",)),),
    ),
]

_CHATS = [
    _chat({"messages": None}, "'NoneType' object is not iterable"),
    _chat({"messages": "hello"}, "'input': 'hello'", "should be a valid list", "body.messages"),
    _chat({"messages": [{"content": "a"}]}, "'<dict of 1 items>'", "Field required", ".role"),
    _chat({"messages": _says("user", 5)}, "'input': '5'", "a valid string", ".content"),
    _chat(
        {"messages": [{"role": 5, "content": "a"}]},
        "'input': '5'",
        "Input should be 'user'",
        ".role",
    ),
    _chat(
        {"messages": _says("user", [{"type": "image_url", "image_url": {"url": "data:,"}}])},
        "demo is not a multimodal model",
        name="an image",
        remedies=(),  # to serve another model
    ),
    _chat(
        {"messages": _says("user", [{"type": "nosuch"}])},
        "'nosuch'",
        "Input should be 'text'",
        "type",
    ),
    _chat({"tools": "all"}, "'input': 'all'", "should be a valid list", "body.tools"),
    _chat({"tools": [{}]}, "'<dict of 0 items>'", "Field required", "body.tools.0.function"),
    _chat(
        {"tool_choice": "nosuch", "tools": _TOOLS},
        "nosuch",
        '"auto" or "required"',
        "tool_choice",
        remedies=tuple(
            ({"tool_choice": choice, "tools": _TOOLS}, ()) for choice in ("auto", "required")
        ),
    ),
    _chat(
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": _TOOLS},
        "The tool specified in `tool_choice`",
        "any of the specified `tools`",
        "does not match",
        name="another tool than those given",
        remedies=(
            (
                {
                    "tool_choice": {"type": "function", "function": {"name": "f"}},
                    "tools": _TOOLS,
                },
                (),
            ),
        ),
    ),
    _chat(
        {"tool_choice": "required"},
        "When using `tool_choice`",
        "`tools` must be set",
        remedies=(({"tool_choice": "required", "tools": _TOOLS}, ()),),
    ),
    _chat(
        {"logprobs": True, "top_logprobs": 10000},
        "of 10000",
        "max allowed: 20",
        "logprobs",
        remedies=(({"logprobs": True, "top_logprobs": 20}, ()),),
    ),
    _chat(
        {"top_logprobs": 5},
        "`top_logprobs`",
        "`logprobs` must be set to true",
        remedies=(({"logprobs": True, "top_logprobs": 5}, ()),),
    ),
    _chat(
        {"chat_template": "{{ nosuch() }}"},
        *_TEMPLATE,
        remedies=(({"chat_template": "Hello"}, ("--trust-request-chat-template",)),),
    ),
    _chat(
        {"response_format": {"type": "json_schema"}},
        "'json_schema'",
        "must be provided",
        "field",
        remedies=(
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "any", "schema": {"type": "object"}},
                    }
                },
                (),
            ),
        ),
    ),
    _chat({"reasoning_effort": "huge"}, "'input': 'huge'", "Input should be 'none'", "_effort"),
]

REQUESTS = [*_BODIES, *_COMPLETIONS, *_CHATS]
