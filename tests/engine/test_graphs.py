"""CUDA graphs without a GPU: real engines of Model Runner V2 over our kernels in Triton's
interpreter, whose graphs :mod:`tests.helpers.graphs` records and replays."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from swa_backend.ops.decode import DecodeBatch
from swa_vllm.attention.triton.backend import SWATritonImpl
from swa_vllm.attention.triton.builder import SWATritonMetadataBuilder
from swa_vllm.kv_cache.spec import SWASpec
from tests.engine.graph_cases import CASES, GRAPHS, LONG, SINKS, Case, run
from tests.helpers.engines import EngineFactory, ModelFactory
from tests.helpers.graph_doubles import installed
from tests.helpers.graphs import CaptureError, Recorder
from tests.helpers.tiny_models import FULL

pytestmark = [
    pytest.mark.long,
    pytest.mark.only_on("0.33/V2"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same cases there"),
    pytest.mark.skipif(
        os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1",
        reason="needs Model Runner V2: bash tests/run.sh --on 0.33/V2",
    ),
]

# All that vLLM accepts; NHD and HND are its other names of LBNHC and LBHNC.
LAYOUTS = ("NHD", "BLHNC", "HND", "BLNHC", "LHBNC", "BHLNC")


@pytest.fixture(scope="module")
def recorder(no_engine: Callable[[], None]) -> Iterator[Recorder]:
    """Records the graphs of all engines of this file."""
    no_engine()
    with installed() as recorder:
        yield recorder
        no_engine()


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the draft model is, so that cases share an engine."""
    return tmp_path_factory.mktemp("draft")


@pytest.fixture
def ask(
    recorder: Recorder,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    draft: Path,
    record_property: Callable[[str, object], None],
) -> Callable[[Case], LLM]:
    """Runs a case from graphs, the largest of more requests than run, and gives its engine."""

    def ask(case: Case) -> LLM:
        # In tokens, of which a request with drafts has four.
        sizes = [16] if case.drafts else [2, 4 if len(case.lengths) < 4 else 8]
        config = {**GRAPHS["compilation_config"], "cudagraph_capture_sizes": sizes}
        model = tiny_model(**FULL, num_hidden_layers=case.num_layers)
        mode = {**GRAPHS, "compilation_config": config}
        record_property("error / noise", run(case, mode, engine, model, draft))
        (llm,) = engine.alive.values()  # type: ignore[attr-defined]
        return llm

    return ask


def runner_of(llm: LLM) -> GPUModelRunner:
    """Model Runner V2 of an engine."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    return runner


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_a_dense_model(
    name: str, ask: Callable[[Case], LLM], recorder: Recorder
) -> None:
    """Three requests decode, padded to a graph of four."""
    num_replays = recorder.num_replays
    llm = ask(CASES[name])
    graphs = runner_of(llm).cudagraph_manager.graphs
    (largest,) = (graph for shape, graph in graphs.items() if shape.num_reqs == 4)
    assert largest.num_replays > 0
    assert recorder.num_replays > num_replays
    assert workspace.current_workspace_manager().is_locked()


@pytest.mark.full
@pytest.mark.parametrize("name", LONG)
def test_long_answers_equal_a_dense_model(
    name: str, ask: Callable[[Case], LLM], recorder: Recorder
) -> None:
    num_replays = recorder.num_replays
    ask(LONG[name])
    assert recorder.num_replays > num_replays


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_engine_without_graphs_equals_a_dense_model(
    name: str, recorder: Recorder, engine: EngineFactory, tiny_model: ModelFactory, draft: Path
) -> None:
    num_replays = recorder.num_replays
    model = tiny_model(**FULL, num_hidden_layers=CASES[name].num_layers)
    run(CASES[name], {}, engine, model, draft)
    assert recorder.num_replays == num_replays


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS[1:])]
)
def test_mixed_layers_are_served_in_every_layout_of_the_kv_cache(
    layout: str, ask: Callable[[Case], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    case = CASES["mixed layers"]
    # Another engine for each.
    llm = ask(replace(case, arguments={"seed": 1 + LAYOUTS.index(layout)}))
    found = llm.llm_engine.vllm_config.cache_config.kv_cache_layout
    assert found == {"NHD": "LBNHC", "HND": "LBHNC"}.get(layout, layout)


def _drop_a_buffer(patch: pytest.MonkeyPatch) -> None:
    """The builder gives distances in memory of the step alone."""
    find = SWATritonMetadataBuilder._find_distances
    patch.setattr(
        SWATritonMetadataBuilder, "_find_distances", lambda self, batch: find(self, batch).clone()
    )


def _change_a_buffer(patch: pytest.MonkeyPatch) -> None:
    """The builder gives distances in other memory at each step, and frees none."""
    find, kept = SWATritonMetadataBuilder._find_distances, list[Any]()

    def find_distances(self: Any, batch: Any) -> Any:
        kept.append(find(self, batch).clone())
        return kept[-1]

    patch.setattr(SWATritonMetadataBuilder, "_find_distances", find_distances)


def _wait_in_a_layer(patch: pytest.MonkeyPatch) -> None:
    """The layer launches for the longest request, if that is shorter than the window."""
    _narrow_windows(patch, lambda lengths: int(lengths.max()))


def _launch_by_lengths(patch: pytest.MonkeyPatch) -> None:
    """The same by a number that the builder has read before."""
    build, longest = SWATritonMetadataBuilder.build, [0]

    def read_and_build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        longest[0] = int(common_attn_metadata.seq_lens.max())
        return build(self, common_prefix_len, common_attn_metadata, fast_build)

    patch.setattr(SWATritonMetadataBuilder, "build", read_and_build)
    _narrow_windows(patch, lambda _: longest[0])


def _narrow_windows(patch: pytest.MonkeyPatch, limit: Callable[[torch.Tensor], int]) -> None:
    """Let layers launch decodes for a window of at most ``limit`` of the requests' lengths."""
    attend = DecodeBatch.attend

    def attend_nearer(self: Any, *args: Any, **kwargs: Any) -> None:
        lengths = self._launch._indices[1]
        if not lengths.is_meta:  # which the builder compiles with
            num_tokens, num_reqs, window, sink_tokens = self._launch._numbers
            window = min(window, limit(lengths))
            self._launch._numbers = (num_tokens, num_reqs, window, sink_tokens)
        attend(self, *args, **kwargs)

    patch.setattr(DecodeBatch, "attend", attend_nearer)


def _keep_memory_of_a_graph(patch: pytest.MonkeyPatch) -> None:
    """The layer makes a constant in the first capture, and uses it ever after."""
    forward, kept = SWATritonImpl.forward, list[torch.Tensor]()

    def scaled(self: Any, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kept and torch.cuda.is_current_stream_capturing():
            kept.append(query.new_ones(()))
        return forward(self, layer, query * kept[0] if kept else query, *args, **kwargs)

    patch.setattr(SWATritonImpl, "forward", scaled)


def _null_rows_below_the_window(patch: pytest.MonkeyPatch) -> None:
    """The spec asks vLLM for what its own windows have: sinks would lie there."""
    if not hasattr(SlidingWindowSpec, "num_retained_tokens"):
        pytest.skip("vLLM nulls no rows before 0.33")
    patch.setattr(SWASpec, "num_retained_tokens", SlidingWindowSpec.num_retained_tokens)


WRONG = (AssertionError, "is not the oracle's")
# Each would be right, or only slow, if there were no graphs and no sinks.
MISTAKES: dict[Callable[[pytest.MonkeyPatch], None], tuple[type[Exception], str]] = {
    _drop_a_buffer: (CaptureError, "over memory that is freed by now"),
    _change_a_buffer: WRONG,
    _wait_in_a_layer: (CaptureError, "the host would wait for the device"),
    _launch_by_lengths: WRONG,
    _keep_memory_of_a_graph: WRONG,
    _null_rows_below_the_window: WRONG,
}
SMALL = Case({**SINKS, "position_shift": True}, (60,), num_tokens=3, num_layers=1)


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__[1:].replace("_", " "))
def test_a_mistake_is_caught(
    make: Callable[[pytest.MonkeyPatch], None],
    ask: Callable[[Case], LLM],
    no_engine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    no_engine()
    make(monkeypatch)
    error, message = MISTAKES[make]
    try:
        with pytest.raises(error, match=message):
            ask(SMALL)
    finally:
        no_engine()  # which has the mistake
    record_property("summary: mutants killed", 1)


def test_without_a_mistake_the_same_is_right(ask: Callable[[Case], LLM]) -> None:
    ask(SMALL)
