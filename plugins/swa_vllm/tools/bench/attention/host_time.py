"""Time of the host for a layer on Triton kernels, this project's and vLLM's, launches left out.

Both are compiled for an H100 and launched on a device that does nothing, so no GPU is needed. What
is left is Python: checks, slices, plans, and Triton's binder where a launch goes through it. As a
module it measures in a process of its own, which Triton keeps this device in.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.kernels.plans import Target
from swa_vllm.attention.backends import windowed_backend
from swa_vllm.attention.layer import WindowedAttention
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.tools.bench.attention.stock_kernel import real_triton_for_stock_kernel
from swa_vllm.tools.bench.attention.times import HEAD_DIM
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.common.timing import time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from swa_vllm.tools.engines.layer import SHAPES, one_layer_engine_checkpoint

DEVICE = Target("cuda", 90, 132)
# Of each request: tokens before, and queries.
BATCHES = {
    "8 decodes": ((2000,) * 8, (1,) * 8),
    "8 decodes and a chunk of 200": ((2000,) * 9, (1,) * 8 + (200,)),
}
_NAME = "model.layers.0.self_attn.attn"


BUILDER, ATTENTION = "metadata builder", "attention of a layer"


@dataclass(frozen=True)
class HostTime:
    """What the host does for a batch in one part of a step.

    Attributes:
        part: :data:`BUILDER`, once a step for a group of layers, or :data:`ATTENTION`.
        batch: a name of :data:`BATCHES`.
        times: seconds, by arm.
        launches: kernels that are launched, by arm.
    """

    part: str
    batch: str
    times: Mapping[str, Spread]
    launches: Mapping[str, int]


def measure_host_time(shape: str, window: int, rounds: int) -> list[HostTime]:
    """Measure both arms in turns, for a layer of ``shape`` in bfloat16, in a process of its own.

    Raises:
        RuntimeError: the process failed, for example because there is no Triton.
    """
    command = [sys.executable, "-m", __name__, shape, str(window), str(rounds)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603 (this module)
    if done.returncode:
        raise RuntimeError(f"the host's time could not be measured: {done.stderr[-1000:]}")
    lines = json.loads(done.stdout.splitlines()[-1])
    return [
        HostTime(part, batch, {arm: Spread(*time) for arm, time in times.items()}, launches)
        for part, batch, times, launches in lines
    ]


def _time_host_of_layer(shape: str, window: int, rounds: int) -> Iterator[HostTime]:
    from swa_backend.verify import aot

    launched: list[str] = []
    with (
        aot.launching_without_gpu(
            DEVICE, lambda source, metadata, *_: launched.append(metadata.name)
        ),
        real_triton_for_stock_kernel(aot.triton_modules(), DEVICE),
        _host_time_engine_config(shape, window) as config,
        set_current_vllm_config(config),
        tempfile.NamedTemporaryFile() as store,
    ):
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        initialize_model_parallel()
        layer = _TimedLayer(shape, window, config)
        for batch, (contexts, queries) in BATCHES.items():
            step = make_batch(list(contexts), list(queries))
            for part, calls in (
                (BUILDER, layer.metadata_builds(step)),
                (ATTENTION, layer.attention_calls(step)),
            ):
                launches = {}
                for arm, call in calls.items():
                    launched.clear()
                    call()
                    launches[arm] = len(launched)
                yield HostTime(part, batch, time_in_turns(calls, rounds), launches)


class _TimedLayer:
    """A windowed layer on this project's kernels, and what vLLM would serve it with on its own."""

    def __init__(self, shape: str, window: int, config: VllmConfig) -> None:
        # Here, where vLLM's modules are imported with a Triton that compiles.
        from vllm.v1.attention.backends.triton_attn import (
            TritonAttentionImpl,
            TritonAttentionMetadataBuilder,
        )

        swa = SWAConfig.from_vllm(config)
        backend = windowed_backend(swa.implementation)
        assert backend is not None
        heads, kv_heads = (
            SHAPES[shape][f"num_{kind}_heads"] for kind in ("attention", "key_value")
        )
        self._layer = WindowedAttention(
            heads,
            HEAD_DIM,
            HEAD_DIM**-0.5,
            num_kv_heads=kv_heads,
            cache_config=config.cache_config,
            per_layer_sliding_window=window,
            attn_backend=backend,
            swa=swa,
            rotary=None,
            prefix=_NAME,
        )
        self._stock = TritonAttentionImpl(
            heads, HEAD_DIM, HEAD_DIM**-0.5, kv_heads, None, window, config.cache_config.cache_dtype
        )
        spec = self._layer.get_kv_cache_spec(config)
        builders = {
            Arm.STOCK: TritonAttentionMetadataBuilder,
            Arm.SWA: backend.get_builder_cls(),
        }
        self._builders = {
            arm.value: kind(spec, [_NAME], config, torch.device("cpu"))
            for arm, kind in builders.items()
        }
        self._heads = (heads, kv_heads, kv_heads)

    def metadata_builds(self, batch: CommonAttentionMetadata) -> dict[str, Callable[[], Any]]:
        """Prepare building a step's metadata, by arm."""
        return {arm: partial(b.build, 0, batch) for arm, b in self._builders.items()}

    def attention_calls(self, batch: CommonAttentionMetadata) -> dict[str, Callable[[], object]]:
        """Prepare storing a step's tokens and attending from them, by arm."""
        query, key, value = (
            torch.zeros(batch.num_actual_tokens, n, HEAD_DIM, dtype=torch.bfloat16)
            for n in self._heads
        )
        num_pages, page = int(batch.block_table_tensor.max()) + 1, BLOCK_SIZE
        cache = torch.zeros(num_pages, self._heads[1], page, 2 * HEAD_DIM, dtype=query.dtype)
        output, layer, stock = torch.empty_like(query), self._layer, self._stock
        steps = {arm: build() for arm, build in self.metadata_builds(batch).items()}

        def run_stock() -> None:
            step = steps[Arm.STOCK.value]
            stock.do_kv_cache_update(layer, key, value, cache, step.slot_mapping)
            stock.forward(layer, query, key, value, cache, step, output)

        def run_here() -> None:
            layer.impl.forward(layer, query, key, value, cache, steps[Arm.SWA.value], output)

        return {Arm.STOCK.value: run_stock, Arm.SWA.value: run_here}


@contextmanager
def _host_time_engine_config(shape: str, window: int) -> Iterator[VllmConfig]:
    """Make the config of an engine whose windows run on this project's kernels."""
    with one_layer_engine_checkpoint(SHAPES[shape], 4096) as model:
        yield EngineArgs(
            model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            max_num_seqs=32,
            additional_config={"swa": {"window": window, "impl": "triton"}},
        ).create_engine_config()


if __name__ == "__main__":
    shape, window, rounds = sys.argv[1:]
    print(json.dumps([astuple(t) for t in _time_host_of_layer(shape, int(window), int(rounds))]))
