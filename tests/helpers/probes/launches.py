"""Launch kernels that were compiled for an H100 on CPU tensors, with a driver that starts nothing.

It compares the arguments of each launch with what its kernel was compiled for. Prints what did not
fit, and how many launches of the first and of a second round went through Triton's own binder.
Without TRITON_INTERPRET.
"""

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from swa_backend import ops
from swa_backend.kernels.plans import Target
from swa_backend.verify.aot import launching_without_gpu

HEADS, KV_HEADS, SIZE, PAGE, TOKENS = 8, 2, 64, 16, 3
INTEGERS = {"i32": 31, "i64": 63}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _misfits(source: Any, arguments: tuple[Any, ...]) -> Iterator[str]:
    """Give what an argument is not that its kernel was compiled for."""
    assert len(source.signature) == len(arguments)
    for index, ((name, kind), value) in enumerate(
        zip(source.signature.items(), arguments, strict=True)
    ):
        attributes = dict(source.attrs.get((index,), ()))
        is_aligned = True
        if kind == "constexpr":
            fits = source.constants[(index,)] == value
        elif isinstance(value, torch.Tensor):
            fits = TYPES[value.dtype] == kind
            is_aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            fits = kind == "fp32"
        else:
            fits = abs(value) < 2 ** INTEGERS[kind]
            is_aligned = value % 16 == 0
        if not fits or (attributes.get("tt.divisibility") == 16 and not is_aligned):
            yield f"{name}: {kind} {attributes}"


def _rows(heads: int, dtype: torch.dtype, offset: int = 0, pad: int = 0) -> torch.Tensor:
    """Rows whose tokens are ``pad`` elements apart, from element ``offset`` on."""
    shape, strides = (TOKENS, heads, SIZE), (heads * SIZE + pad, SIZE, 1)
    return torch.zeros(TOKENS * strides[0] + offset, dtype=dtype).as_strided(shape, strides, offset)


def _cache(dtype: torch.dtype, by_token: bool = False, offset: int = 0) -> torch.Tensor:
    shape = (4, PAGE, KV_HEADS, 2 * SIZE) if by_token else (4, KV_HEADS, PAGE, 2 * SIZE)
    cache = torch.zeros(math.prod(shape) + offset, dtype=torch.float32).to(dtype)
    cache = cache[offset:].view(shape)
    return cache.transpose(1, 2) if by_token else cache


def _variants() -> list[Any]:
    """Launches that differ in one way each."""
    bf16, fp16, fp8 = torch.bfloat16, torch.float16, torch.float8_e5m2
    layouts = [{}, {"offset": 1}, {"pad": 8}, {"pad": 1}, {"pad": 16}]
    calls = []
    for dtype, layout in [*((bf16, layout) for layout in layouts), (fp16, {}), (fp16, {"pad": 1})]:
        for cache in (
            _cache(dtype),
            _cache(dtype, by_token=True),
            _cache(dtype, offset=1),
            _cache(fp8),
        ):
            calls += [_write(_rows(KV_HEADS, dtype, **layout), cache)]
    for layout in layouts[:3]:
        for num_reqs in (1, TOKENS):
            calls += [_decode(_rows(HEADS, bf16, **layout)[:num_reqs], _cache(bf16))]
    return calls


def _write(rows: torch.Tensor, cache: torch.Tensor) -> Any:
    slots = torch.arange(TOKENS + 1)
    return lambda first: ops.write_pages(
        rows, rows, cache, slots[first : first + TOKENS], impl="triton"
    )


def _decode(query: torch.Tensor, cache: torch.Tensor) -> Any:
    table, lengths = torch.zeros(TOKENS + 1, 3).int(), torch.ones(TOKENS + 1).int()
    stop = len(query)
    return lambda first: ops.decode_attention(
        query,
        cache,
        table[first : first + stop],
        lengths[first : first + stop],
        window=200,
        impl="triton",
    )


def main() -> None:
    launched, misfits = list[str](), list[str]()
    bound: list[int] = []
    run = JITFunction.run

    def compare(source: Any, metadata: Any, *arguments: Any) -> None:
        launched.append(metadata.name)
        misfits.extend(f"{metadata.name} {m}" for m in _misfits(source, arguments[9:]))

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound.append(1)
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    rounds = []
    generator = random.Random(3)
    with launching_without_gpu(Target("cuda", 90, 132), compare):
        for _ in range(2):
            before = len(launched), len(bound)
            calls = _variants()
            generator.shuffle(calls)
            for call in calls:
                for first in (0, 1):
                    call(first)
            rounds.append([len(launched) - before[0], len(bound) - before[1]])
    print(json.dumps({"misfits": misfits, "rounds": rounds, "kernels": sorted({*launched})}))


if __name__ == "__main__":
    main()
