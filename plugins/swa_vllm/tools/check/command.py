"""Whether windows would be served here: versions, what vLLM resolves, device, kernels, a model.

Stops at the first thing that is wrong, says what to do about it, and exits with status 1. With
MODEL, a local directory with a config.json, it ends with what each layer would do. Of weights only
the headers are read, where there are any.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from swa_vllm.tools.check import device as check_device
from swa_vllm.tools.check import steps as check_steps
from swa_vllm.tools.common.terminal import GREEN, RED, YELLOW, paint
from swa_vllm.tools.plan.command import add_window_arguments, window_options

EXAMPLE = "Qwen3-8B --window 4096 --sink-tokens 4 --full-attention-layers every:4"


class State(StrEnum):
    """Of one thing that was looked at."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "not checked"


_COLOURS = {State.OK: GREEN, State.WRONG: RED, State.UNKNOWN: YELLOW}


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        what: the thing.
        remedy: what to do about what is wrong, or why nothing was checked.
    """

    what: str
    state: State
    detail: str
    remedy: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a local directory")
    add_window_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what is found, line by line; returns it, and sets the exit status."""
    options = window_options(args)
    if args.model is None and options:
        raise ValueError(f"--{next(iter(options)).replace('_', '-')} is about a model: give MODEL")
    findings = []
    for finding in findings_of(args.model, options):
        findings.append(finding)
        label = paint(finding.state.value.ljust(11), _COLOURS[finding.state])
        lines = f"{finding.what}: {finding.detail}".splitlines()
        print(f"{label}  " + f"\n{'':13}".join(lines), flush=True)
        if finding.remedy is not None:
            print(f"{'':13}remedy: {finding.remedy}")
    is_ok = all(finding.state is not State.WRONG for finding in findings)
    args.status = 0 if is_ok else 1
    return {"ok": is_ok, "findings": [asdict(finding) for finding in findings]}


def findings_of(model: str | None, options: dict[str, Any]) -> Iterator[Finding]:
    """Everything in the order in which one thing needs the other, up to the first that is wrong."""
    steps: list[tuple[str, Callable[[], str]]] = [
        ("vLLM", check_steps.vllm_version),
        ("plugin", check_steps.plugin),
        ("models", check_steps.model_classes),
        ("attention backend", check_steps.backend_slot),
        ("page manager", check_steps.page_manager),
        ("device", check_device.device),
        ("Triton", check_device.triton_compiles),
        ("kernels", check_device.kernels_are_right),
        ("CPU operators", check_device.cpu_operators_are_right),
    ]
    if model is not None:
        steps.append((model, lambda: check_steps.layers_of(model, options)))
    for what, step in steps:
        try:
            yield Finding(what, State.OK, step())
        except check_steps.NotCheckedError as reason:
            yield Finding(what, State.UNKNOWN, str(reason))
        except check_steps.ProblemError as problem:
            yield Finding(what, State.WRONG, str(problem), problem.remedy)
            return
