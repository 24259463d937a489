"""The steps of ``swa check`` about the device: what serves on it, and whether it is right."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from swa_backend.window import Phase
from swa_vllm.tools.check.problems import NotCheckedError, ProblemError

_T = TypeVar("_T")
LIMIT_S = 300.0  # of a smoke test


def inspect_device() -> str:
    """Check that this plugin serves on the device; names the device and what attention runs on."""
    from vllm.platforms import current_platform

    from swa_backend.kernels.device import target_of

    if current_platform.is_cuda_alike():
        target = _try_on_gpu(target_of)
        return (
            f"{current_platform.get_device_name()} ({target.backend} {target.arch}); windowed "
            "layers run on this project's Triton kernels"
        )
    if current_platform.is_cpu():
        return f"CPU ({platform.machine()}); windowed layers run on vLLM's CPU operators"
    raise ProblemError(
        f"{current_platform.device_type}, for which this plugin has no attention backend",
        "serve windows on an NVIDIA or AMD GPU, or on a CPU",
    )


def leave_out_kernels() -> str:
    """Say that kernels and operators were neither compiled nor run."""
    raise NotCheckedError("--deep compiles and runs them, which takes half a minute")


def inspect_triton() -> str:
    """Check that Triton compiles for this GPU, or without one for those that the gate lists."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise NotCheckedError("TRITON_INTERPRET=1 makes Triton interpret; unset it to compile")
    from vllm.platforms import current_platform

    from swa_backend.kernels.device import target_of
    from swa_backend.verify.gate import TARGETS, verify_decode_compiles

    is_here = current_platform.is_cuda_alike()
    targets = (_try_on_gpu(target_of),) if is_here else TARGETS
    for target in targets:
        try:
            verify_decode_compiles(target)
        except Exception as error:  # compilers fail in any way
            raise ProblemError(
                f"the decode kernel does not compile for {target.backend} {target.arch}: {error!r}",
                "install the Triton that this vLLM requires, and gcc",
            ) from error
    names = ", ".join(f"{'sm_' if t.backend == 'cuda' else ''}{t.arch}" for t in targets)
    return f"compiles the decode kernel for {names}{'' if is_here else '; no GPU is here'}"


def inspect_kernels() -> str:
    """Check that kernels equal the oracle; on a CPU in a process whose Triton interprets."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from swa_backend.verify.smoke import smoke

        error, where = _try_on_gpu(smoke), "on this GPU"
    else:
        # Triton interprets from its import on or never.
        error = _error_of_smoke_test("swa_backend.verify.smoke", TRITON_INTERPRET="1")
        where = "in Triton's interpreter"
    return f"write, decode and prefill equal the oracle {where} (to {error:.2f} roundings)"


def inspect_cpu_operators(phase: Phase) -> str:
    """Check that one layer in an engine equals plain torch, where vLLM's CPU operators serve.

    Args:
        phase: whose queries have the layer's window.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise NotCheckedError("this device does not use them")
    error = _error_of_smoke_test("swa_vllm.tools.check.smoke_layer", phase)
    kind = "a sliding layer with sinks"
    if phase is not Phase.BOTH:
        kind += f", of phase {phase},"
    return f"{kind} equals plain torch (to {100 * error:.1f} %)"


def _error_of_smoke_test(module: str, *arguments: str, **environment: str) -> float:
    """Run a module of ours in a process of its own; returns the number that it prints last."""
    try:
        done = subprocess.run(  # noqa: S603 (a module of ours)
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ProblemError(
            f"{module} did not end within {LIMIT_S:g} s",
            "look for what keeps this machine busy, and check again",
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()  # none, if a signal ended it
        said = lines[-1] if lines else f"{module} ended with status {done.returncode}"
        raise ProblemError(said, _REPORT)
    return float(done.stdout.split()[-1])


_REPORT = "serve without windows here, and report this line with your versions"


def _try_on_gpu(action: Callable[[Any], _T]) -> _T:
    """Run an action on the GPU, and raise what goes wrong as a problem."""
    import torch

    try:
        return action(torch.device("cuda"))
    except ValueError as error:
        remedy = "serve windows on a newer GPU, or full attention here"
        raise ProblemError(str(error), remedy) from error
    except Exception as error:  # drivers and compilers fail in any way
        raise ProblemError(repr(error), _REPORT) from error
