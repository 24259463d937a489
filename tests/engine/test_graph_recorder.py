"""The graphs that engines of ``test_graphs.py`` replay, looked at without an engine."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor

from tests.helpers.graphs import CaptureError, Recorder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there graphs are CUDA's")

WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "slice": lambda x: x[: x[1].long()],
    "contains": lambda x: 2.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to device": lambda x: x.to(device="cpu"),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.__setitem__(x > 0, x[0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "from Python": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@triton.jit
def copy_kernel(out_ptr, in_ptr, factor, SIZE: tl.constexpr):  # noqa: N803
    """Each program copies one element of ``in_ptr``, times ``factor``."""
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(in_ptr + i) * factor)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(
        GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: recorder.launch(self, *args, **kwargs),
    )
    with torch.inference_mode():
        yield recorder


def test_replay_reads_what_memory_holds_by_then(recorder: Recorder) -> None:
    x, y, z = torch.ones(3), torch.zeros(3), torch.zeros(3)
    graph = recorder.make_graph()
    with recorder.capture(graph):
        copy_kernel[(3,)](y, x * 2, 10.0, SIZE=1)
        z.copy_(y[1:].sum().expand(3))
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert y.tolist() == [20.0, 40.0, 60.0]
    assert z.tolist() == [100.0] * 3
    assert recorder.num_replays == 1


def test_numbers_and_grid_are_those_of_the_capture(recorder: Recorder) -> None:
    x, y, count = torch.ones(3), torch.zeros(3), 2
    graph = recorder.make_graph()
    with recorder.capture(graph):
        copy_kernel[lambda meta: (count,)](y, x, float(count), SIZE=1)
    count = 3
    graph.replay()
    assert y.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("name", WAITS)
def test_waiting_for_the_device_is_refused(name: str, recorder: Recorder) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    WAITS[name](x)
    with (
        pytest.raises(CaptureError, match="the host would wait"),
        recorder.capture(recorder.make_graph()),
    ):
        WAITS[name](x)
    WAITS[name](x)


def test_an_operator_in_python_is_refused(recorder: Recorder) -> None:
    @torch.library.custom_op("swa_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with (
        pytest.raises(CaptureError, match="not known to be a kernel"),
        recorder.capture(recorder.make_graph()),
    ):
        double(torch.ones(3))


def test_memory_that_a_graph_allocates_is_its_own(recorder: Recorder) -> None:
    x = torch.ones(3)
    graph = recorder.make_graph()
    with recorder.capture(graph):
        y = x * 2
    assert y.isnan().all()
    graph.replay()
    assert y.isnan().all()


@pytest.mark.parametrize("is_kept", [False, True], ids=["freed", "kept"])
def test_memory_that_is_freed_after_a_capture_is_missed(is_kept: bool, recorder: Recorder) -> None:
    x, y = torch.ones(3), torch.zeros(3)
    graph = recorder.make_graph()
    temporary = x.clone()
    with recorder.capture(graph):
        y.copy_(temporary[1:].sum().expand(3))
    if is_kept:
        graph.replay()
        assert y.tolist() == [2.0] * 3
        return
    del temporary
    with pytest.raises(CaptureError, match=r"sum.* was captured over memory that is freed"):
        graph.replay()


def test_reset_forgets(recorder: Recorder) -> None:
    x, y = torch.ones(3), torch.zeros(3)
    graph = recorder.make_graph()
    with recorder.capture(graph):
        y.copy_(x)
    graph.reset()
    y.zero_()
    graph.replay()
    assert y.tolist() == [0.0] * 3
