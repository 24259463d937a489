"""Whether windows would be served here: a model and options, versions, what vLLM resolves, device.

Stops at the first thing that is wrong, says what to do about it, and exits with status 1. Options
and the files of MODEL are checked before anything of vLLM is
imported; last comes what each layer would do. Of weights only the headers are read, where there are
any. All flags of vLLM's engine are taken, as vllm serve has them, not only those below; leave out
those of its HTTP server. With --deep the kernels are compiled and compared with their definition,
which takes half a minute.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from swa_vllm.config.additional_config import parse_additional_config
from swa_vllm.tools.check import device, files, steps
from swa_vllm.tools.check.problems import NotCheckedError, ProblemError
from swa_vllm.tools.common.arguments import (
    add_additional_config_argument,
    add_window_arguments,
    additional_config_of_arguments,
    check_number_arguments,
    json_object_of_flag,
    options_of_window_arguments,
)
from swa_vllm.tools.common.engine_arguments import add_engine_arguments
from swa_vllm.tools.common.hub import find_model
from swa_vllm.tools.common.progress import say_if_slow
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


# Of vLLM's engine; what is not given is vLLM's choice.
_NUMBERS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "block_size",
)
_ENGINE = ("dtype", "kv_cache_dtype", *_NUMBERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa check``."""
    parser.set_defaults(model=None)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=argparse.SUPPRESS,
        help="a directory, or a hub's name that is cached",
    )
    add_window_arguments(parser)
    add_additional_config_argument(parser)
    add_engine_arguments(parser, **dict.fromkeys(_ENGINE, "vLLM's"))
    parser.add_argument(
        "--hf-overrides", default="{}", metavar="JSON", help="as vLLM takes it (default: {})"
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="compile and run the kernels too, which takes half a minute",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print each finding as it comes; returns all of them, and sets the exit status."""
    arguments = _engine_arguments(args)
    if args.model is None and arguments:
        flags = [*options_of_window_arguments(args), *arguments]
        raise ValueError(f"--{flags[0].replace('_', '-')} is about a model: give MODEL")
    findings = []
    for finding in findings_of(args.model, arguments, deep=args.deep):
        findings.append(finding)
        label = paint(finding.state.value.ljust(11), _COLOURS[finding.state])
        lines = f"{finding.what}: {finding.detail}".splitlines()
        print(f"{label}  " + f"\n{'':13}".join(lines), flush=True)
        if finding.remedy is not None:
            print(f"{'':13}remedy: {finding.remedy}")
    is_ok = all(finding.state is not State.WRONG for finding in findings)
    args.status = 0 if is_ok else 1
    return {"ok": is_ok, "findings": [asdict(finding) for finding in findings]}


def _engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of vLLM's engine that are given.

    Raises:
        ValueError: one of them is wrong, whatever the model.
    """
    check_number_arguments(args, _NUMBERS)
    overrides = json_object_of_flag(
        "--hf-overrides", args.hf_overrides, '{"max_position_embeddings": 512}'
    )
    own = {
        "additional_config": additional_config_of_arguments(args),
        "hf_overrides": overrides,
        **{name: getattr(args, name) for name in _ENGINE},
    }
    found = {name: value for name, value in own.items() if value}
    if not hasattr(args, "load_format"):  # no flag but those below was given
        return found
    from swa_vllm.tools.check.engine_flags import given_engine_arguments

    others = given_engine_arguments(args)
    return found | {name: value for name, value in others.items() if name not in own}


def findings_of(
    model: str | None, arguments: dict[str, Any], *, deep: bool = False
) -> Iterator[Finding]:
    """Check one thing after the other, each before what needs it, up to the first that is wrong.

    Args:
        arguments: of vLLM's engine, beside the model.
        deep: whether kernels and operators are compiled and run.
    """
    todo: list[tuple[str, Callable[[], str]]] = [
        ("vLLM", steps.inspect_vllm),
        ("plugin", steps.inspect_plugin),
        ("models", steps.inspect_model_classes),
        ("attention backend", steps.inspect_backend_slot),
        ("page manager", steps.inspect_page_manager),
        ("device", device.inspect_device),
    ]
    if model is not None:
        todo.insert(0, ("model", lambda: files.inspect_files(model, arguments)))
        todo.append((model, lambda: steps.inspect_model(str(find_model(model)), arguments)))
    if deep:
        phase = parse_additional_config(arguments.get("additional_config")).phase
        todo += [
            ("Triton", device.inspect_triton),
            ("kernels", device.inspect_kernels),
            ("CPU operators", lambda: device.inspect_cpu_operators(phase)),
        ]
    else:
        todo.append(("kernels", device.leave_out_kernels))
    for what, step in todo:
        try:
            with say_if_slow(f"checking {what}"):
                detail = step()
            yield Finding(what, State.OK, detail)
        except NotCheckedError as reason:
            yield Finding(what, State.UNKNOWN, str(reason))
        except ProblemError as problem:
            yield Finding(what, State.WRONG, str(problem), problem.remedy)
            return
