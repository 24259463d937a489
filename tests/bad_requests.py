"""HTTP requests that a server refuses; messages are vLLM's.

``given`` is the path below ``/v1/`` and the body: keys beside those of a good request, or bytes.
"""

from typing import Any

from bad_row import Bad

LIMIT = 2048  # --max-model-len of the server


def _request(name: str, path: str, body: Any, status: int, *parts: str) -> Bad:
    got, allowed, do = (*parts, *[parts[-1]] * 3)[:3]
    return Bad(name, (path, body, status), got, allowed, do)


def _completion(name: str, keys: dict[str, Any], *parts: str, status: int = 400) -> Bad:
    return _request(name, "completions", keys, status, *parts)


def _chat(name: str, keys: dict[str, Any], *parts: str, status: int = 400) -> Bad:
    return _request(name, "chat/completions", keys, status, *parts)


REQUESTS = [
    _request("no JSON", "completions", b"{", 400, "x"),
    _request("empty", "completions", b"", 400, "x"),
    _request("a list", "completions", b"[]", 400, "x"),
    _request("null", "completions", b"null", 400, "x"),
    _request("no UTF-8", "completions", b'{"prompt": "\xff\xfe"}', 400, "x"),
    _request(
        "lone surrogate",
        "completions",
        b'{"model": "demo", "prompt": "\\ud800", "max_tokens": 2}',
        400,
        "x",
    ),
    _request(
        "nested 10000", "completions", b'{"prompt": ' + b"[" * 10000 + b"]" * 10000 + b"}", 400, "x"
    ),
    _request("nosuch path", "nosuch", {}, 404, "x"),
    _completion("unknown model", {"model": "other"}, "x", status=404),
    _completion("no prompt", {"prompt": None}, "x"),
    _completion("empty prompt", {"prompt": ""}, "x"),
    _completion("empty list", {"prompt": []}, "x"),
    _completion("prompt object", {"prompt": {"a": 1}}, "x"),
    _completion("prompt number", {"prompt": 5}, "x"),
    _completion("token negative", {"prompt": [-1, 5]}, "x"),
    _completion("token beyond", {"prompt": [10**6]}, "x"),
    _completion("token huge", {"prompt": [2**70]}, "x"),
    _completion("too long", {"prompt": "word " * 5000}, "x"),
    _completion("too long ids", {"prompt": [5] * 4096}, "x"),
    _completion("max_tokens beyond", {"max_tokens": 10**6}, "x"),
    _completion("max_tokens 0", {"max_tokens": 0}, "x"),
    _completion("max_tokens neg", {"max_tokens": -1}, "x"),
    _completion("max_tokens str", {"max_tokens": "many"}, "x"),
    _completion("max_tokens float", {"max_tokens": 2.5}, "x"),
    _completion("max_tokens huge", {"max_tokens": 2**70}, "x"),
    _completion("n 0", {"n": 0}, "x"),
    _completion("n -1", {"n": -1}, "x"),
    _completion("n huge", {"n": 10**9}, "x"),
    _completion("n 2 greedy", {"n": 2}, "x"),
    _completion("temperature -1", {"temperature": -1}, "x"),
    _completion("temperature str", {"temperature": "hot"}, "x"),
    _request(
        "temperature NaN",
        "completions",
        b'{"model": "demo", "prompt": "a", "temperature": NaN}',
        400,
        "x",
    ),
    _completion("top_p 2", {"top_p": 2}, "x"),
    _completion("top_p 0", {"top_p": 0}, "x"),
    _completion("top_k -5", {"top_k": -5}, "x"),
    _completion("min_p 2", {"min_p": 2}, "x"),
    _completion("repetition 0", {"repetition_penalty": 0}, "x"),
    _completion("presence 9", {"presence_penalty": 9}, "x"),
    _completion("logprobs 10000", {"logprobs": 10000}, "x"),
    _completion("logprobs -2", {"logprobs": -2}, "x"),
    _completion("logprobs str", {"logprobs": "all"}, "x"),
    _completion("prompt_logprobs huge", {"prompt_logprobs": 10**6}, "x"),
    _completion("seed huge", {"seed": 2**70}, "x"),
    _completion("stop bad", {"stop": 5}, "x"),
    _completion("stop token ids", {"stop_token_ids": ["a"]}, "x"),
    _completion("min>max", {"min_tokens": 50, "max_tokens": 5}, "x"),
    _completion("logit_bias", {"logit_bias": {"a": 1}}, "x"),
    _completion("logit_bias beyond", {"logit_bias": {"99999999": 1}}, "x"),
    _completion("allowed beyond", {"allowed_token_ids": [10**9]}, "x"),
    _completion("bad_words", {"bad_words": [""]}, "x"),
    _completion("stream options", {"stream_options": {"include_usage": True}}, "x"),
    _completion("truncate", {"truncate_prompt_tokens": 10**6}, "x"),
    _completion("priority", {"priority": 5}, "x"),
    _completion("structured", {"structured_outputs": {"regex": "("}}, "x"),
    _completion("structured json", {"structured_outputs": {"json": {"type": "nosuch"}}}, "x"),
    _completion("structured grammar", {"structured_outputs": {"grammar": "root ::= ("}}, "x"),
    _completion("response_format", {"response_format": {"type": "nosuch"}}, "x"),
    _completion("echo prompts", {"prompt_embeds": "AAAA"}, "x"),
    _chat("no messages", {"messages": None}, "x"),
    _chat("empty messages", {"messages": []}, "x"),
    _chat("messages text", {"messages": "hello"}, "x"),
    _chat("no role", {"messages": [{"content": "a"}]}, "x"),
    _chat("role number", {"messages": [{"role": 5, "content": "a"}]}, "x"),
    _chat("content number", {"messages": [{"role": "user", "content": 5}]}, "x"),
    _chat(
        "image",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
            ]
        },
        "x",
    ),
    _chat("part type", {"messages": [{"role": "user", "content": [{"type": "nosuch"}]}]}, "x"),
    _chat("tools text", {"tools": "all"}, "x"),
    _chat("tools empty obj", {"tools": [{}]}, "x"),
    _chat(
        "tool choice",
        {"tool_choice": "nosuch", "tools": [{"type": "function", "function": {"name": "f"}}]},
        "x",
    ),
    _chat(
        "tool choice missing",
        {
            "tool_choice": {"type": "function", "function": {"name": "g"}},
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        "x",
    ),
    _chat("tool choice without tools", {"tool_choice": "required"}, "x"),
    _chat("top_logprobs huge", {"logprobs": True, "top_logprobs": 10000}, "x"),
    _chat("top_logprobs alone", {"top_logprobs": 5}, "x"),
    _chat("template", {"chat_template": "{{ nosuch() }}"}, "x"),
    _chat("template syntax", {"chat_template": "{% if"}, "x"),
    _chat("json schema", {"response_format": {"type": "json_schema"}}, "x"),
    _chat("effort", {"reasoning_effort": "infinite"}, "x"),
]
