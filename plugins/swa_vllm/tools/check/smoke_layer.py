"""A smoke test of windows on a CPU: one layer with sinks in an engine, against plain torch.

``python -m swa_vllm.tools.check.smoke_layer PHASE`` prints the error, relative to the largest
output.
"""

import sys

import torch

from swa_backend.pages import max_partial_tokens
from swa_backend.window import Phase
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from swa_vllm.tools.engines.layer import make_layer

_WINDOW, _SINKS = 40, 4
# Context, queries and, where they matter, prompt of each request.
_REQUESTS: dict[Phase, list[tuple[int, int, int]]] = {
    Phase.BOTH: [(1, 1, 0), (39, 1, 0), (200, 1, 0)],
    # The last one's chunk crosses the end of its prompt.
    Phase.PREFILL: [(1, 1, 1), (39, 1, 39), (200, 120, 260)],
    # Of a prompt; with a window that reaches into the prompt; beyond it; across the prompt's end.
    Phase.DECODE: [(60, 40, 120), (45, 1, 20), (200, 1, 70), (100, 60, 110)],
}
_SPARE = {Phase.BOTH: _SINKS, Phase.PREFILL: 0, Phase.DECODE: max_partial_tokens(BLOCK_SIZE)}


def main(phase: Phase) -> None:
    """Serve a step of a few requests, some of them beyond their windows, and print the error.

    Raises:
        RuntimeError: the output is wrong.
    """
    layer = make_layer("Qwen3-0.6B", _WINDOW, 512, 32, {"sink_tokens": _SINKS, "phase": phase})
    contexts, queries, prompts = map(list, zip(*_REQUESTS[phase], strict=True))
    qkv = layer.random_inputs(sum(queries))
    torch.nn.init.normal_(layer.attention.kv_cache)
    batch = make_batch(
        contexts,
        queries,
        spare_tokens=_SPARE[phase],
        prompts=None if phase is Phase.BOTH else prompts,
    )
    output = layer.run(layer.builder.build(0, batch), *qkv)
    print(
        max(
            layer.check_against_torch(batch, qkv, output, _WINDOW, _SINKS, phase, request)
            for request in range(len(contexts))
        )
    )


if __name__ == "__main__":
    main(Phase(sys.argv[1]))
