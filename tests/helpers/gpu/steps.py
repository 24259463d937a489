"""The steps of ``tests/gpu.sh``, those that tell most in a minute first."""

from dataclasses import dataclass, field

# Modules that the tests of engines import.
_ENGINE = ("torch", "triton", "vllm", "pytest", "hypothesis")
_PARTS = "tests.helpers.gpu"


@dataclass(frozen=True)
class Step:
    """A process with a time limit.

    Attributes:
        name: in the record, and of the step's log.
        command: arguments of Python.
        dry: the same on a machine without a GPU, as far as that goes.
        dry_lacks: what is left out there, so that the step did not run; empty if it did.
        limit_s: after which it is killed.
        needs: modules without which it is not run.
        tool: program that runs Python, with its arguments; not in a dry run.
        environment: variables of its process.
    """

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...]
    limit_s: int
    needs: tuple[str, ...]
    tool: tuple[str, ...] = ()
    dry_lacks: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def _part(name: str, limit_s: int, *needs: str) -> Step:
    command = ("-m", f"{_PARTS}.{name}")
    return Step(name, command, (*command, "--dry-run"), limit_s, ("torch", *needs))


def _tests(
    name: str, limit_s: int, selected: str, *files: str, dry: tuple[str, ...] = ("--collect-only",)
) -> Step:
    """Tests of ``files`` that are marked for a GPU and whose names match ``selected``."""
    options = ("-o", "addopts=", "--import-mode=importlib", "-q", "-p", "no:cacheprovider")
    chosen = ("-p", f"{_PARTS}.pytest_record", "-m", "gpu and not full", "-k", selected, *files)
    command = ("-m", "pytest", *options, *chosen)
    lacks = "dry run: its tests were collected, and need a GPU" if "--collect-only" in dry else ""
    return Step(name, command, (*command, *dry), limit_s, _ENGINE, dry_lacks=lacks)


_KERNELS = tuple(
    f"tests/backend/test_{name}.py" for name in ("kernels", "kernels_prefill", "rotate_back")
)
_GPU = "tests/engine/test_gpu.py"
_TRITON = "tests/engine/test_triton_engine.py"
_SMOKE = ("-m", "swa_backend.verify.smoke")


def _kernels() -> Step:
    """The tests of kernels, which need no vLLM without the fixtures of the test-suite."""
    step = _tests("kernels", 70, "equals_the_oracle or fp8 or long_text", *_KERNELS)
    command = (*step.command, "--noconftest")
    dry = (*command, "-k", "write_equals or rotate")
    return Step(step.name, command, dry, step.limit_s, ("torch", "triton", "pytest"))


STEPS = (
    _part("versions", 45),
    _kernels(),
    _part("times", 50, "triton", "vllm"),
    _tests("engine eager", 55, "dense_model and eager", _GPU),
    _tests("engine graphs", 50, "dense_model and graphs", _GPU),
    _tests("mixed layers", 40, "mixed_model and not compiled", _GPU),
    _tests("drafts in graphs", 35, "drafts and graphs", _GPU),
    _tests("fp8 cache", 30, "fp8_cache", _TRITON, dry=()),
    _tests("compiled", 60, "dense_model and compiled and V2", _GPU),
    _tests("offloading", 40, "offloading", _GPU),
    _part("serve", 115, "triton", "vllm"),
    Step(
        "sanitizer",
        _SMOKE,
        _SMOKE,
        50,
        ("torch", "triton"),
        tool=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        dry_lacks="dry run: without compute-sanitizer",
        # The sanitizer sees only what CUDA itself allocates.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
)
