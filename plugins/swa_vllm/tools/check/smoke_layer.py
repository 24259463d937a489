"""A smoke test of windows on a CPU: one layer with sinks in an engine, against plain torch.

``python -m swa_vllm.tools.check.smoke_layer PHASE`` prints the error, relative to the largest
output.
"""

import sys

import torch

from swa_backend.window import Phase
from swa_vllm.tools.engines.batches import make_batch
from swa_vllm.tools.engines.layer import make_layer

_WINDOW, _SINKS = 40, 4


def main(phase: Phase) -> None:
    """Decode with three requests, the longest of them beyond its window, and print the error.

    With a window in the prompt only, the longest has a chunk that crosses the end of its prompt.

    Raises:
        RuntimeError: the output is wrong.
    """
    layer = make_layer("Qwen3-0.6B", _WINDOW, 512, 32, {"sink_tokens": _SINKS, "phase": phase})
    contexts, queries, prompts = [1, 39, 200], [1, 1, 1], None
    if phase is Phase.PREFILL:
        queries, prompts = [1, 1, 120], [1, 39, 260]
    qkv = layer.random_inputs(sum(queries))
    torch.nn.init.normal_(layer.attention.kv_cache)
    batch = make_batch(contexts, queries, spare_tokens=0 if prompts else _SINKS, prompts=prompts)
    output = layer.run(layer.builder.build(0, batch), *qkv)
    print(layer.check_against_torch(batch, qkv, output, _WINDOW, _SINKS, phase))


if __name__ == "__main__":
    main(Phase(sys.argv[1]))
