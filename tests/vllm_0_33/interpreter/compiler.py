"""What Triton asks of a compiler."""

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend as _BaseBackend
from triton.backends.compiler import GPUTarget


class InterpreterBackend(_BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return str(target.backend) == "cpu"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("this backend compiles nothing: set TRITON_INTERPRET=1")

    hash = parse_options = add_stages = load_dialects = get_module_map = _refuse
