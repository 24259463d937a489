"""CUDA graphs on a CPU: what a capture records is run again over the same memory.

Operators in C++ and Triton's launches are recorded, with the numbers and the grid of the capture. A
graph knows memory by its place alone, as a GPU does, and what it allocates is its own.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

_launch = GridExecutor.__call__
# Of kernels. An operator of another library may be Python, of which a graph would see nothing.
_LIBRARIES = {"aten", "prims", "_C", "_C_cache_ops"}
# These count what is set, if they are given a mask.
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}
# Methods that copy to the host; on a CPU they are no operators.
_COPIES = {
    torch.Tensor.cpu: "cpu",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.__array__: "__array__",
}


class CaptureError(RuntimeError):
    """What a GPU could not capture, or what a replay would read from memory that is gone."""


@dataclass(frozen=True)
class _Memory:
    """Where a tensor lies.

    Attributes:
        storage: itself, if the graph allocated it; else a weak reference.
    """

    storage: Any
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self, reader: str) -> torch.Tensor:
        """The tensor again, for the kernel that ``reader`` names."""
        storage = self.storage
        if isinstance(storage, StorageWeakRef):
            if storage.expired():  # type: ignore[no-untyped-call]
                raise CaptureError(f"{reader} was captured over memory that is freed by now")
            storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Node:
    """One kernel: ``call`` with ``args`` and ``kwargs``, and where it left what it returned."""

    name: str
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[_Memory, ...]

    def run(self) -> None:
        def at(leaf: Any) -> Any:
            return leaf.tensor(self.name) if isinstance(leaf, _Memory) else leaf

        results = _tensors(self.call(*tree_map(at, self.args), **tree_map(at, self.kwargs)))
        for memory, result in zip(self.outputs, results, strict=True):
            out = memory.tensor(self.name)
            if out.data_ptr() != result.data_ptr():
                out.copy_(result)


@dataclass
class Graph:
    """The double of ``torch.cuda.CUDAGraph``.

    Attributes:
        nodes: what it runs.
        num_replays: how often it did.
    """

    nodes: list[_Node] = field(default_factory=list)
    num_replays: int = 0
    _own: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @torch.inference_mode()
    def replay(self) -> None:
        """Run every kernel again."""
        self.num_replays += 1
        for node in self.nodes:
            node.run()
        self.spoil()

    def reset(self) -> None:
        """Forget what was captured."""
        self.nodes.clear()
        self._own.clear()

    def spoil(self) -> None:
        """Fill the graph's own memory with NaN: between replays other graphs have it."""
        for storage in self._own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)

    def add(
        self, name: str, call: Any, args: Any, kwargs: Any, outputs: Any = (), *, writes: bool
    ) -> None:
        """Record what has just been run; ``writes`` says whether it writes to its arguments."""
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        results = _tensors(outputs)
        fresh = [tensor for tensor in results if _address(tensor) not in given]
        if not fresh and not writes:
            return  # a view
        self._own.update((_address(tensor), tensor.untyped_storage()) for tensor in fresh)
        args, kwargs = tree_map(self._place, args), tree_map(self._place, kwargs)
        self.nodes.append(_Node(name, call, args, kwargs, tuple(map(self._place, results))))

    def _place(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        storage: Any = self._own.get(_address(leaf))
        if storage is None:
            storage = StorageWeakRef(leaf.untyped_storage())  # type: ignore[no-untyped-call]
        offset = int(leaf.storage_offset())
        return _Memory(storage, leaf.dtype, tuple(leaf.shape), leaf.stride(), offset)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _waits(operator: Any, args: Any) -> bool:
    """Whether the host has to wait for numbers of the device, be it to know a shape."""
    if operator in _INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    tags = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    # A tensor made of Python's numbers is copied from memory that is not pinned.
    return operator is torch.ops.aten.lift_fresh.default or any(t in operator.tags for t in tags)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators, and refuses those for which the host would wait."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if _waits(func, args):
            raise CaptureError(f"{func} in a capture: the host would wait for the device")
        if func.namespace not in _LIBRARIES:
            raise CaptureError(f"{func} in a capture: it is not known to be a kernel")
        is_composite = "CompositeImplicitAutograd"
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), is_composite):
            with self:  # and record what it is made of
                return func.decompose(*args, **kwargs)
        outputs = func(*args, **kwargs)
        self.graph.add(str(func), func, args, kwargs, outputs, writes=func._schema.is_mutable)
        return outputs


class _Methods(TorchFunctionMode):
    """Refuses methods that copy to the host."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The device is a CPU as well, but code that means the device does not write "cpu".
        is_copy = func is torch.Tensor.to and "cpu" in [*args[1:], kwargs.get("device")]
        if (is_copy or func in _COPIES) and not self._operators.is_paused:
            raise CaptureError(f"{_COPIES.get(func, 'to')} in a capture: the host would wait")
        return func(*args, **kwargs)


class Recorder:
    """Captures one graph at a time.

    Attributes:
        graphs: all that were made.
    """

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self._operators: _Operators | None = None

    @property
    def num_replays(self) -> int:
        """Replays of all graphs."""
        return sum(graph.num_replays for graph in self.graphs)

    def is_capturing(self) -> bool:
        """The double of ``torch.cuda.is_current_stream_capturing``."""
        return self._operators is not None

    def make_graph(self) -> Graph:
        """The double of ``torch.cuda.CUDAGraph``."""
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """The double of ``torch.cuda.graph``."""
        assert self._operators is None
        self._operators = _Operators(graph)
        try:
            with _Methods(self._operators), self._operators:
                yield
        finally:
            self._operators = None
        graph.spoil()

    def launch(self, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """The double of a launch in Triton's interpreter."""
        operators = self._operators
        if operators is None or operators.is_paused:
            _launch(executor, *args, **kwargs)
            return
        grid, grids = executor.grid, list[Any]()

        def first(meta: Any) -> Any:
            grids.append(grid(meta) if callable(grid) else grid)
            return grids[0]

        executor.grid = first
        operators.is_paused = True  # the interpreter works on tensors of its own
        try:
            _launch(executor, *args, **kwargs)
        finally:
            operators.is_paused = False
        (executor.grid,) = grids  # whatever it would be at a replay
        name = executor.fn.__name__
        operators.graph.add(name, _launch, (executor, *args), kwargs, writes=True)
