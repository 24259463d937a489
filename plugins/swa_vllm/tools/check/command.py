"""Whether windows would be served here: versions, what vLLM resolves, device, kernels, a model.

Stops at the first thing that is wrong, says what to do about it, and exits with status 1. With
MODEL, a local directory with a config.json, it ends with what each layer would do. Of weights only
the headers are read, where there are any.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from swa_backend.options import SWAConfigError, SWAOptions, shown_value
from swa_vllm.tools.check import device, steps
from swa_vllm.tools.common.arguments import (
    add_window_arguments,
    options_as_flags,
    options_of_window_arguments,
)
from swa_vllm.tools.common.terminal import GREEN, RED, YELLOW, paint

EXAMPLE = "Qwen3-8B --window 4096 --sink-tokens 4 --full-attention-layers every:4"


class State(StrEnum):
    """The verdict on one thing that is checked."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "not checked"


_COLOURS = {State.OK: GREEN, State.WRONG: RED, State.UNKNOWN: YELLOW}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: the name of the thing.
        detail: what is there, what is wrong, or why nothing was checked.
        remedy: what to do about what is wrong.
    """

    what: str
    state: State
    detail: str
    remedy: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa check``."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a local directory")
    add_window_arguments(parser)
    parser.add_argument("--hf-overrides", default="{}", metavar="JSON", help="as vLLM takes it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print each finding as it comes; returns all of them, and sets the exit status."""
    options, overrides = _parse_options(args), _parse_overrides(args.hf_overrides)
    about_a_model = [*options, *(["hf_overrides"] if overrides else [])]
    if args.model is None and about_a_model:
        raise ValueError(f"--{about_a_model[0].replace('_', '-')} is about a model: give MODEL")
    findings = []
    for finding in findings_of(args.model, options, overrides):
        findings.append(finding)
        label = paint(finding.state.value.ljust(11), _COLOURS[finding.state])
        lines = f"{finding.what}: {finding.detail}".splitlines()
        print(f"{label}  " + f"\n{'':13}".join(lines), flush=True)
        if finding.remedy is not None:
            print(f"{'':13}remedy: {finding.remedy}")
    is_ok = all(finding.state is not State.WRONG for finding in findings)
    args.status = 0 if is_ok else 1
    return {"ok": is_ok, "findings": [asdict(finding) for finding in findings]}


def _parse_options(args: argparse.Namespace) -> dict[str, Any]:
    options = options_of_window_arguments(args)
    try:
        SWAOptions.from_dict(options)
    except SWAConfigError as error:
        raise ValueError(options_as_flags(str(error))) from error
    return options


def _parse_overrides(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except ValueError:
        overrides = None
    if not isinstance(overrides, dict):
        raise ValueError(
            f"--hf-overrides must be a JSON object, got {shown_value(text)}; give one such as "
            """'{"max_position_embeddings": 512}'"""
        )
    return overrides


def findings_of(
    model: str | None, options: dict[str, Any], hf_overrides: dict[str, Any]
) -> Iterator[Finding]:
    """Check one thing after the other, each before what needs it, up to the first that is wrong."""
    phase = SWAOptions.from_dict(options).phase
    todo: list[tuple[str, Callable[[], str]]] = [
        ("vLLM", steps.inspect_vllm),
        ("plugin", steps.inspect_plugin),
        ("models", steps.inspect_model_classes),
        ("attention backend", steps.inspect_backend_slot),
        ("page manager", steps.inspect_page_manager),
        ("device", device.inspect_device),
        ("Triton", device.inspect_triton),
        ("kernels", device.inspect_kernels),
        ("CPU operators", lambda: device.inspect_cpu_operators(phase)),
    ]
    if model is not None:
        todo.append((model, lambda: steps.inspect_model(model, options, hf_overrides)))
    for what, step in todo:
        try:
            yield Finding(what, State.OK, step())
        except steps.NotCheckedError as reason:
            yield Finding(what, State.UNKNOWN, str(reason))
        except steps.ProblemError as problem:
            yield Finding(what, State.WRONG, str(problem), problem.remedy)
            return
