"""Calls of :mod:`swa_backend.ops` that are refused."""

import math
from functools import partial
from typing import Any

import torch

from swa_backend.window import Phase
from tests.bad_input.row import Bad

QUERY = torch.randn(2, 4, 16)
TABLE = torch.randn(100, 16)
LENGTHS = torch.tensor([9, 3]).int()


def arguments_of(name: str) -> dict[str, Any]:
    """Arguments of a valid call: two requests, two KV heads, groups of two, pages of 16."""
    pages: dict[str, Any] = {
        "kv_cache": torch.randn(3, 2, 16, 32),
        "block_table": torch.tensor([[0, 1], [2, 0]]).int(),
        "seq_lens": torch.tensor([20, 7]).int(),
        "window": 8,
    }
    if name == "decode_attention":
        return {"query": torch.randn(2, 4, 16), **pages}
    if name == "prefill_attention":  # chunks of two tokens and of one
        own = {"key": torch.randn(3, 2, 16), "value": torch.randn(3, 2, 16)}
        starts = torch.tensor([0, 2, 3]).int()
        return {"query": torch.randn(3, 4, 16), **own, **pages, "query_start_loc": starts}
    if name == "rotate_back":
        return {"states": QUERY, "distances": torch.zeros(2).long(), "table": TABLE}
    own = {"key": torch.randn(2, 2, 16), "value": torch.randn(2, 2, 16)}
    return {**own, "kv_cache": torch.zeros(3, 2, 16, 32), "slot_mapping": torch.tensor([4, 40])}


def _row(
    operation: str,
    changes: dict[str, Any],
    error: type[Exception],
    got: str,
    allowed: str,
    do: str = "must",
) -> Bad:
    verb = operation.partition("_")[0]
    given = f"{verb} {', '.join(changes)} {got}"
    return Bad(given, (operation, changes), got, allowed, do, error)


_decode = partial(_row, "decode_attention")
_prefill = partial(_row, "prefill_attention")
_write = partial(_row, "write_pages")
_rotate = partial(_row, "rotate_back")

_ROWS = "must be float32, float16 or bfloat16 [num_tokens, heads, head_dim]"
_CONTIGUOUS = "must be contiguous in its last dimension"
_CACHE = "kv_cache must have query's dtype, float8_e4m3fn or float8_e5m2"

_DECODE = [
    _decode({"query": QUERY.double()}, TypeError, "got float64 [2, 4, 16]", f"query {_ROWS}"),
    _decode({"query": QUERY[0]}, TypeError, "got float32 [4, 16]", f"query {_ROWS}"),
    _decode({"query": [[1.0]]}, TypeError, "got a list", f"query {_ROWS}"),
    _decode({"query": QUERY.half()}, TypeError, "query is float16 [2, 4, 16]", _CACHE),
    _decode({"kv_cache": None}, TypeError, "kv_cache a NoneType", _CACHE),
    _decode(
        {"kv_cache": torch.randn(3, 2, 16, 16)},
        ValueError,
        "got float32 [3, 2, 16, 16]",
        "kv_cache must be [num_pages, num_kv_heads, page, 32]",
    ),
    _decode(
        {"kv_cache": torch.empty_strided((3, 2, 16, 32), (1, 1, 2**28, 1), device="meta")},
        ValueError,
        "got strides (1, 1, 268435456, 1)",
        "within 2**31 elements",
    ),
    _decode(
        {"query": torch.randn(2, 3, 16)},
        ValueError,
        "query has 3 heads",
        "no multiple of the cache's 2",
        "give as many",
    ),
    _decode({"seq_lens": torch.tensor([20, 7])}, TypeError, "got int64 [2]", "be int32 [any]"),
    _decode({"seq_lens": torch.tensor(20).int()}, TypeError, "got int32 []", "be int32 [any]"),
    _decode({"seq_lens": [20, 7]}, TypeError, "got a list", "seq_lens must be int32 [any]"),
    _decode({"block_table": torch.zeros(3, 2).int()}, TypeError, "int32 [3, 2]", "int32 [2, any]"),
    _decode({"query_start_loc": torch.zeros(2).int()}, TypeError, "got int32 [2]", "be int32 [3]"),
    _decode(
        {"query": torch.randn(3, 4, 16)},
        ValueError,
        "got 3 queries for 2 requests",
        "without which each request has one",
        "give query_start_loc",
    ),
    _decode({"out": QUERY[:1]}, TypeError, "got float32 [1, 4", "must be as query, float32 [2, 4"),
    _decode(
        {"sink_query": QUERY.half(), "sink_tokens": 1}, TypeError, "got float16", "must be as query"
    ),
    _decode(
        {"sink_query": QUERY}, ValueError, "sink_query", "no key meets it", "needs sink_tokens"
    ),
    *(
        _decode({"window": window}, ValueError, f"got {window!r}", "window must be an integer >= 1")
        for window in (0, -4, True, 8.0, "8", math.nan, 2**31)
    ),
    *(
        _decode({"sink_tokens": sinks}, ValueError, f"got {sinks!r}", "must be an integer >= 0")
        for sinks in (-1, False, 1.5, None)
    ),
    *(
        _decode({name: scale}, ValueError, f"got {scale!r}", f"{name} must be a positive number")
        for name in ("k_scale", "v_scale")
        for scale in (0.0, -1.0, math.nan, math.inf, "1")
    ),
    _decode(
        {"out": torch.empty(2, 4, 16, device="meta")},
        ValueError,
        "out is on meta",
        "kv_cache on cpu",
        "move it there",
    ),
    _decode(
        {"scratch": torch.zeros(9, device="meta")},
        ValueError,
        "scratch is on meta",
        "kv_cache on cpu",
        "move it there",
    ),
    _decode({"scratch": torch.zeros(9).half()}, TypeError, "got float16 [9]", "contiguous float32"),
    _decode(
        {"block_table": torch.zeros(2, 2).int().T},
        ValueError,
        "got strides (1, 2)",
        f"block_table {_CONTIGUOUS}",
        "call block_table.contiguous()",
    ),
    _decode(
        {"seq_lens": torch.ones(2, 2).int()[:, 0]},
        ValueError,
        "got strides (2,)",
        f"seq_lens {_CONTIGUOUS}",
        "call seq_lens.contiguous()",
    ),
    _decode(
        {"phase": "decode"}, TypeError, "got 'decode'", "Phase.BOTH, Phase.PREFILL, Phase.DECODE"
    ),
    _decode({"phase": Phase.DECODE}, ValueError, "Phase.DECODE", "int32 [num_reqs]", "needs"),
    _decode(
        {"phase": Phase.PREFILL, "window": None, "prompt_lens": LENGTHS},
        ValueError,
        "Phase.PREFILL needs a window",
        "or Phase.BOTH",
        "give one",
    ),
    _decode(
        {"prompt_lens": LENGTHS},
        ValueError,
        "prompt_lens",
        "other than Phase.BOTH",
        "needs a phase",
    ),
    _decode(
        {"phase": Phase.DECODE, "prompt_lens": LENGTHS.long()},
        TypeError,
        "got int64 [2]",
        "prompt_lens must be int32 [2]",
    ),
    _decode(
        {
            "phase": Phase.DECODE,
            "prompt_lens": LENGTHS,
            "sink_tokens": 1,
            "sink_query": QUERY,
        },
        ValueError,
        "Phase.DECODE has no sink_query",
        "what stays visible is the prompt",
        "at its own distance",
    ),
    _decode({"scale": -0.5}, ValueError, "got -0.5", "positive number", "scale must be"),
    _decode({"impl": "cuda"}, ValueError, "got 'cuda'", "one of auto, triton, torch", "impl must"),
    _decode(
        {"query": torch.randn(2, 4, 24), "kv_cache": torch.randn(3, 2, 16, 48), "impl": "triton"},
        ValueError,
        "got 24",
        "a power of two and at least 16",
        'use impl="torch"',
    ),
    _decode(
        {"query": torch.randn(2, 4, 32)[..., ::2], "impl": "triton"},
        ValueError,
        "got strides (128, 32, 2)",
        f"query {_CONTIGUOUS}",
        "call query.contiguous()",
    ),
]

_OWN = "the cache's heads, [3, 2, 16]"
_PREFILL = [
    _prefill({"key": torch.randn(2, 2, 16)}, TypeError, "key float32 [2, 2, 16]", _OWN),
    _prefill({"key": torch.randn(3, 2, 16).half()}, TypeError, "key float16 [3, 2, 16]", _OWN),
    _prefill(
        {"value": torch.randn(3, 1, 16)}, TypeError, "got float32 [3, 1", "be as key, float32"
    ),
    _prefill({"query_start_loc": torch.zeros(2).int()}, TypeError, "got int32 [2]", "be int32 [3]"),
    _prefill({"query_start_loc": None}, TypeError, "got a NoneType", "must be int32 [3]"),
    _prefill({"window": 0}, ValueError, "got 0", "window must be an integer >= 1"),
    _prefill({"scale": 0.0}, ValueError, "got 0.0", "positive number", "scale must be"),
    _prefill(
        {"out": torch.empty(3, 4, 16, device="meta")}, ValueError, "on meta", "cpu", "move it"
    ),
    _prefill(
        {"phase": Phase.DECODE, "prompt_lens": LENGTHS, "impl": "xformers"},
        ValueError,
        'got phase="decode"',
        "xformers has no mask of phases",
        'use impl="triton"',
    ),
    _prefill(
        {"impl": "cuda"}, ValueError, "got 'cuda'", "auto, triton, torch, xformers", "impl must"
    ),
    _prefill(
        {"key": torch.randn(3, 2, 32)[..., ::2], "impl": "triton"},
        ValueError,
        "got strides (64, 32, 2)",
        f"key {_CONTIGUOUS}",
        "call key.contiguous()",
    ),
]

_WRITE = [
    _write(
        {"key": torch.randn(2, 2, 16).half()}, TypeError, "key is float16", "must have key's dtype"
    ),
    _write(
        {"value": torch.randn(2, 2, 8)}, TypeError, "got float32 [2, 2, 8]", "be as key, float32"
    ),
    _write({"slot_mapping": torch.zeros(2).int()}, TypeError, "got int32 [2]", "be int64 [any]"),
    _write(
        {"slot_mapping": torch.zeros(2, 2).long()[:, 0]},
        ValueError,
        "got strides (2,)",
        f"slot_mapping {_CONTIGUOUS}",
        "call slot_mapping.contiguous()",
    ),
    _write(
        {"slot_mapping": torch.arange(3)},
        ValueError,
        "got 3 slots for 2 tokens of 2 heads",
        "a cache of 2",
        "give at most one slot a token",
    ),
    _write(
        {"key": torch.randn(2, 4, 16), "value": torch.randn(2, 4, 16)},
        ValueError,
        "2 tokens of 4 heads",
        "a cache of 2",
        "and equal heads",
    ),
    _write({"v_scale": -1.0}, ValueError, "got -1.0", "v_scale must be a positive number"),
]

_TABLE = "even number of columns up to states' head_dim 16"
_ROTATE = [
    _rotate({"states": QUERY.double()}, TypeError, "got float64", f"states {_ROWS}"),
    _rotate({"distances": torch.zeros(2)}, TypeError, "got float32 [2]", "must be int64 [2]"),
    _rotate({"distances": torch.zeros(3).long()}, TypeError, "got int64 [3]", "must be int64 [2]"),
    _rotate({"table": TABLE.long()}, TypeError, "got int64 [100, 16]", "be float32, float16 or"),
    _rotate({"table": TABLE[:, :15]}, ValueError, "got float32 [100, 15]", _TABLE),
    _rotate({"table": torch.ones(9, 18)}, ValueError, "got float32 [9, 18]", _TABLE),
    _rotate(
        {"table": TABLE.repeat(1, 2)[:, ::2]}, ValueError, "got float32", "rows that are contig"
    ),
    _rotate({"out": QUERY[:1]}, TypeError, "got float32 [1, 4, 16]", "out must be as states"),
    _rotate(
        {"table": TABLE.to("meta")}, ValueError, "table is on meta", "states on cpu", "move it"
    ),
    _rotate({"impl": "cuda"}, ValueError, "got 'cuda'", "one of auto, triton, torch", "impl must"),
]

OPERATIONS = [*_DECODE, *_PREFILL, *_WRITE, *_ROTATE]
