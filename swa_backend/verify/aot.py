"""Compiles launches without a GPU and reads what came out: registers, memory, loads.

Or counts what would be compiled.

Triton must not interpret: with ``TRITON_INTERPRET=1`` there is nothing to compile.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swa_backend.kernels.device import pretend_device
from swa_backend.kernels.plans import Target
from swa_backend.kernels.tiles import IS_INTERPRETED
from swa_backend.pages import ceil_div

_KIB = 1024
# Bytes of shared memory of a multiprocessor, by compute capability; a program may have 1 KiB less,
# which the driver keeps for each (CUDA C++ programming guide, "compute capabilities").
_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
_LDS = 64 * _KIB
_RESERVED = _KIB
# Bytes of an entry of a block table, which may be copied asynchronously too.
_PAGE_ID = 4
_REGISTERS = 64 * _KIB
# The file whose functions load keys and values.
_TILES = "tiles.py"
_THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}


@dataclass(frozen=True)
class Facts:
    """Resources that a compiled kernel takes, and instructions that it uses.

    Attributes:
        registers: registers of a thread.
        spilled_bytes: a thread's stack and local memory; on AMD spilled registers.
        shared_bytes: shared memory of a program.
        shared_limit: most shared memory that a program can have on the device.
        kv_buffers: buffers of the smallest ring of ``[tile, head_dim]`` tiles; 1 overlaps nothing.
        load_bytes: narrowest asynchronous copy of keys and values; where there is none, narrowest
            vector load. None if every load is of 4 bytes.
        programs_per_processor: programs that fit on a multiprocessor; None on AMD.
        product: the tensor cores' instruction in machine code; None without a matrix product.
        is_serialized: whether each of sm_90's asynchronous products waits for the one before, as
            ptxas decides where it finds no registers for them.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    kv_buffers: int
    load_bytes: int | None
    programs_per_processor: int | None
    product: str | None
    is_serialized: bool = False


def triton_modules() -> dict[str, Any]:
    """Give Triton and its language by the names that kernels use for them."""
    return {"triton": triton, "tl": triton.language}


@contextmanager
def compiling_without_gpu(target: Target) -> Iterator[dict[str, Any]]:
    """Compile the launches inside for ``target``, exactly as there, and start none of them.

    Holds for the whole process: Triton has one driver and one set of hooks.

    Yields:
        The compiled kernels, by the names of their functions.

    Raises:
        RuntimeError: under Triton's interpreter.
    """
    compiled: dict[str, Any] = {}

    def compile_only(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        compiled[function.__name__] = triton.compile(
            ASTSource(function, compile["signature"], compile["constants"], *compile["configs"]),
            target=_Driver(target).get_current_target(),
            options=_recorded_compiler_options(
                json.loads(compile["specialization_data"])["options"]
            ),
        )
        return True

    with _instead_of_compiling(target, compile_only):
        yield compiled


@contextmanager
def recording_compile_keys(target: Target) -> Iterator[set[tuple[str, str]]]:
    """Record what the launches inside would be compiled for; as :func:`compiling` otherwise.

    Yields:
        Names of functions with the keys by which Triton tells compiled kernels apart.
    """
    keys: set[tuple[str, str]] = set()

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        keys.add((fn.name, key))
        return True

    with _instead_of_compiling(target, record):
        yield keys


@contextmanager
def launching_without_gpu(target: Target, launched: Callable[..., None]) -> Iterator[None]:
    """Compile and launch what is inside as on ``target``, on a device that does nothing.

    What is left of a launch is the host's part, without that of the device's driver. Tensors may
    lie anywhere. For a process of its own: Triton keeps the device as long as the kernels, which
    means to the end.

    Args:
        launched: called at each launch with the kernel's source and metadata, and what the driver
            would be given: a grid of three, stream, function, two of metadata, two hooks, and the
            kernel's arguments.

    Raises:
        RuntimeError: under Triton's interpreter.
    """
    _refuse_interpreter()
    triton.runtime.driver.set_active(_IdleDriver(target, launched))
    with pretend_device(target):
        yield


@contextmanager
def _instead_of_compiling(target: Target, hook: Callable[..., bool]) -> Iterator[None]:
    """Call ``hook`` at each launch inside, which is for ``target``, and start none of them."""
    _refuse_interpreter()
    # Before it compiles, Triton asks its cache hook whether somebody else does; then it neither
    # keeps a kernel nor launches one.
    with triton.knobs.runtime.scope(), pretend_device(target):
        triton.knobs.runtime.jit_cache_hook = hook
        triton.runtime.driver.set_active(_Driver(target))
        try:
            yield
        finally:
            # Not by reset_active, which looks for a GPU at once; without a driver Triton does so
            # when it needs one.
            triton.runtime.driver.set_active(None)


def _refuse_interpreter() -> None:
    if IS_INTERPRETED:
        raise RuntimeError(
            "kernels cannot be compiled under Triton's interpreter; unset TRITON_INTERPRET"
        )


def _recorded_compiler_options(value: Any) -> Any:
    """Restore a compiler's options from JSON, which has made lists of their tuples."""
    if isinstance(value, dict):
        return {name: _recorded_compiler_options(item) for name, item in value.items()}
    return tuple(map(_recorded_compiler_options, value)) if isinstance(value, list) else value


class _Driver:
    """The part of a GPU's driver that Triton asks before it compiles."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        warp = 64 if self._target.backend == "hip" else 32
        return GPUTarget(self._target.backend, self._target.arch, warp)

    def get_current_device(self) -> int | str:
        """Name the device by its architecture: Triton keeps a kernel's binder by device."""
        return self._target.arch

    def get_current_stream(self, device: Any) -> int:
        return 0


class _IdleDriver(_Driver):
    """A driver that loads every kernel and starts none."""

    def __init__(self, target: Target, launched: Callable[..., None]) -> None:
        super().__init__(target)
        self._launched = launched
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20},
            # A module, a function, registers, spills and the most threads of a program.
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            unload_module=lambda _: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Make what Triton calls to launch a kernel."""
        return partial(self._launched, source, metadata)


def facts_of_compiled(kernel: Any, target: Target) -> Facts:
    """Read the facts of a kernel that :func:`compiling` gave."""
    return _amd_facts(kernel) if target.backend == "hip" else _nvidia_facts(kernel, target)


def _nvidia_facts(kernel: Any, target: Target) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _run_tool("nvdisasm", "--print-code", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    arch, shared = int(target.arch), kernel.metadata.shared
    num_threads = 32 * kernel.metadata.num_warps
    # Registers are given out in units of 8 a thread.
    registers = ceil_div(used["REG"], 8) * 8 * num_threads
    return Facts(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        shared_limit=_SHARED[arch] * _KIB - _RESERVED,
        kv_buffers=_compiled_kv_buffers(kernel),
        load_bytes=_nvidia_load_bytes(kernel.asm["ptx"]),
        programs_per_processor=min(
            _SHARED[arch] * _KIB // (shared + _RESERVED),
            _REGISTERS // registers,
            _THREADS[arch] // num_threads,
        ),
        product=_product_instruction(code),
        is_serialized=_sass_is_serialized(code),
    )


def _amd_facts(kernel: Any) -> Facts:
    assembly = kernel.asm["amdgcn"]
    used = dict(re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return Facts(
        registers=int(used["vgpr_count"]),
        spilled_bytes=int(used["vgpr_spill_count"]) + int(used["private_segment_fixed_size"]),
        shared_bytes=kernel.metadata.shared,
        shared_limit=_LDS,
        kv_buffers=_compiled_kv_buffers(kernel),
        load_bytes=_amd_load_bytes(assembly),
        programs_per_processor=None,
        product=_product_instruction(assembly),
    )


def _product_instruction(assembly: str) -> str | None:
    # The first two reach the full rate of sm_100 and sm_90; the last is AMD's.
    names = ("UTCHMMA", "HGMMA", "HMMA", "v_mfma")
    return next((name for name in names if re.search(rf"\b{name}", assembly)), None)


def _sass_is_serialized(code: str) -> bool:
    num_products = len(re.findall(r"\bHGMMA", code))
    return 0 < num_products <= len(re.findall(r"\bWARPGROUP\.ARRIVE", code))


def _compiled_kv_buffers(kernel: Any) -> int:
    """Find the leading size of the smallest ring that the pipeline keeps loaded tiles in."""
    rings = re.findall(r"local_alloc :.*memdesc<(\d+)x\d+x\d+x", kernel.asm["ttgir"])
    return min(map(int, rings), default=1)


def _nvidia_load_bytes(ptx: str) -> int | None:
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    if copies:
        return min((width for copy in copies if (width := int(copy, 0)) > _PAGE_ID), default=None)
    loads = re.findall(r"ld\.global\S*\.v(\d)\.b(\d+)", ptx)
    return min((int(lanes) * int(bits) // 8 for lanes, bits in loads), default=None)


def _amd_load_bytes(assembly: str) -> int | None:
    """Find the narrowest vector load of keys and values; without any, the narrowest of all.

    A load of queries, once a program, may be narrower.
    """
    of_tiles, others, file = list[int](), list[int](), ""
    for line in assembly.splitlines():
        if place := re.search(r"\.loc\b.*;\s*(\S+\.py):", line):
            file = place[1]
        elif load := re.search(r"(?:global|buffer)_load_dwordx(\d)", line):
            widths = of_tiles if file == _TILES else others
            widths.append(4 * int(load[1]))
    return min(of_tiles or others, default=None)


def _run_tool(name: str, *arguments: str) -> str:
    """Run one of the NVIDIA tools that Triton brings; returns its output."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (Triton's)
    return done.stdout
