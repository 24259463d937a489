"""What Triton asks of a driver; a CPU has no stream and one device.

Without a backend named "cpu" vLLM switches Triton off on a CPU, and Model Runner V2, whose own
kernels are written in it, refuses to start. The real one (triton-cpu) is on no package index. The
entry point of this one is on the path only where the tests run V2.
"""

from typing import Any, NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase as _DriverBase


class InterpreterDriver(_DriverBase):
    """A CPU; kernels are launched by the interpreter, without a driver."""

    def __init__(self) -> None:
        """Take no device."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError("this backend launches nothing: set TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_benchmarker = _refuse

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0
