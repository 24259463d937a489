"""A smoke test of windows on a CPU: one layer with sinks in an engine, against plain torch.

``python -m swa_vllm.tools.check.smoke_layer`` prints the error, relative to the largest output.
"""

import torch

from swa_vllm.tools.engines.batches import make_batch
from swa_vllm.tools.engines.layer import make_layer

_WINDOW, _SINKS = 40, 4


def main() -> None:
    """Decode with three requests, the longest of them beyond its window, and print the error.

    Raises:
        RuntimeError: the output is wrong.
    """
    layer = make_layer("Qwen3-0.6B", _WINDOW, 512, 32, {"sink_tokens": _SINKS})
    contexts = [1, 39, 200]
    queries = [1] * len(contexts)
    qkv = layer.random_inputs(len(contexts))
    torch.nn.init.normal_(layer.attention.kv_cache)
    batch = make_batch(contexts, queries, spare_tokens=_SINKS)
    output = layer.run(layer.builder.build(0, batch), *qkv)
    print(layer.check_against_torch(batch, qkv, output, _WINDOW, _SINKS))


if __name__ == "__main__":
    main()
