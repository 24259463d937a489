"""Count what Triton would compile while one layer serves random batches, after its builder.

Arguments: a model, the number of batches, and parameters of kernels that Triton is made to
specialize for again. Without TRITON_INTERPRET; nothing is compiled and no kernel runs.
"""

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swa_backend.kernels import cache_write, decode, prefill, rotate
from swa_backend.kernels.plans import Target
from swa_backend.verify.aot import recording_compile_keys
from tests.helpers.kernel_layer import PAGE, SIZE, KernelLayer, by_v1

NUM_HEADS, NUM_KV_HEADS, MAX_LENGTH, MAX_TOKENS = 8, 4, 512, 512
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
ANGLES = torch.zeros(MAX_LENGTH, SIZE)
ROTARY = SimpleNamespace(cos_sin_cache=ANGLES, rotary_dim=SIZE, is_neox_style=True)
CASES: dict[str, dict[str, Any]] = {
    "window": {"sink_tokens": 0},
    "many requests": {"sink_tokens": 0, "max_num_seqs": 256},
    "sinks": {},
    "shifted": {"rotary": ROTARY},
    "drafts": DRAFTS,
    "prompt only": {"phase": "prefill", **DRAFTS},
    "answer only": {"phase": "decode", **DRAFTS},
    "fp8": {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
    "one page": {"window": 8, "sink_tokens": 0, "max_model_len": PAGE},
}
TARGETS = (Target("cuda", 90, 132), Target("cuda", 80, 108), Target("hip", "gfx942", 304))


def main() -> None:
    model, num_batches, *specialized = sys.argv[1:]
    for module in (cache_write, decode, prefill, rotate):
        for name, kernel in vars(module).items():
            for parameter in kernel.params if name.endswith("_kernel") else ():
                if parameter.name in specialized:
                    parameter.do_not_specialize = False
                    parameter.do_not_specialize_on_alignment = False
    found = {}
    for index, (name, changes) in enumerate(CASES.items()):
        target = TARGETS[index % len(TARGETS)]
        with pytest.MonkeyPatch.context() as patch, recording_compile_keys(target) as keys:
            layer = KernelLayer(
                model,
                patch,
                **{
                    "window": 400,
                    "num_heads": NUM_HEADS,
                    "num_kv_heads": NUM_KV_HEADS,
                    "max_num_seqs": 40,
                    "max_num_batched_tokens": MAX_TOKENS,
                    "max_model_len": MAX_LENGTH,
                    **changes,
                },
            )
            before = set(keys)
            _serve(layer, random.Random(7), int(num_batches))
            late = sorted({kernel for kernel, _ in keys - before})
        found[name] = {"before": len(before), "late": late, "unused": len(before - keys)}
    print(json.dumps(found))


def _serve(layer: KernelLayer, generator: random.Random, num_batches: int) -> None:
    """Drive builder and layer with batches of decodes, drafts and chunks, mixed and padded."""
    scheduler = layer.config.scheduler_config
    longest, most = layer.config.model_config.max_model_len, scheduler.max_num_seqs
    num_drafts = layer.config.num_speculative_tokens
    dtype = layer.config.model_config.dtype
    cache_dtype = torch.uint8 if layer.layer.impl.cache_dtype else dtype
    cache = torch.empty(4, PAGE, NUM_KV_HEADS, 2 * SIZE, dtype=cache_dtype).transpose(1, 2)
    qkv = torch.zeros(MAX_TOKENS, NUM_HEADS + 2 * NUM_KV_HEADS, SIZE, dtype=dtype)
    out = torch.empty(MAX_TOKENS, NUM_HEADS, SIZE, dtype=dtype)
    for _ in range(num_batches):
        num_prefills = generator.choice((0, 0, 1, 1, 2, 3))
        num_decodes = generator.randint(not num_prefills, most - num_prefills)
        queries = [
            *(generator.randint(1, 1 + num_drafts) for _ in range(num_decodes)),
            *(generator.randint(2, min(100, longest)) for _ in range(num_prefills)),
        ]
        requests = [(generator.randint(0, longest - n), n) for n in queries]
        pad_to = len(requests) if num_prefills else generator.randint(len(requests), most)
        prompt_lens = None
        if layer.phase != "both":
            prompt_lens = [generator.randint(1, longest) for _ in requests]
        step = layer.batch(requests, pad_to, pad_to - len(requests), prompt_lens)
        num_tokens = step["num_tokens"]
        if num_tokens > MAX_TOKENS:
            continue
        sizes = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
        query, key, value = torch.split(qkv[:num_tokens], sizes, dim=1)
        layer.layer.impl.forward(
            layer.layer, query, key, value, cache, by_v1(layer, step), out[:num_tokens]
        )


if __name__ == "__main__":
    main()
