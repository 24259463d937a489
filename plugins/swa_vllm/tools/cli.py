"""The ``swa`` command."""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

import swa_backend
from swa_vllm.tools.bench.flags import BENCHMARKS
from swa_vllm.tools.common.arguments import check_output_path, error_text
from swa_vllm.tools.common.parser import Parser
from swa_vllm.tools.common.plots import add_plot_argument
from swa_vllm.tools.eval.flags import EVALUATIONS

# Each is ``<verb>/command.py``.
_VERBS = ("plan", "check", "trace", "tune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "vllm" not in sys.modules:
        # vLLM's own start-up lines would bury a tool's output; set it to see them.
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(level)  # for what it logs before it reads that
    try:
        args, unknown = _command_parser(arguments).parse_known_args(arguments)
        innermost: Parser = args.parser
        if unknown and args.command == "check":
            # All flags of vLLM's engine are its own too: they are read once vLLM is imported.
            from swa_vllm.tools.check.engine_flags import engine_parser

            with_engine = _command_parser(arguments, parents_of_check=[engine_parser()])
            args, unknown = with_engine.parse_known_args(arguments)
        if unknown:
            innermost.refuse_unknown(unknown)
        # Figures alone where a program reads them.
        if args.json not in (None, "-"):
            check_output_path("--json", Path(args.json))
        with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):
            result = args.run(args)
        if args.json is not None:
            _write_command_figures(json.dumps(result, indent=2) + "\n", args.json)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "transformers"):  # the second comes with the first
            raise
        print(
            f"error: swa {arguments[0]} needs vLLM, which is not installed. On a machine with a "
            "GPU: pip install 'swa-backend[gpu]'; without one: bash examples/setup_env.sh",
            file=sys.stderr,
        )
        return 1
    return int(getattr(args, "status", 0))


def _write_command_figures(text: str, path: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


def _command_parser(
    arguments: Sequence[str], parents_of_check: Sequence[argparse.ArgumentParser] = ()
) -> Parser:
    parser = Parser(
        prog="swa", description=__doc__, epilog="example: swa check Qwen3-8B --window 4096"
    )
    parser.add_argument(
        "--version", action="version", version=f"swa-backend {swa_backend.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _VERBS:
        module = import_module(f"swa_vllm.tools.{name}.command")
        parents = parents_of_check if name == "check" else ()
        verb = _add_command(commands, name, str(module.__doc__), module.EXAMPLE, parents=parents)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    bench = commands.add_parser(
        "bench",
        help="measure this plugin side by side with stock vLLM",
        description="Measure this plugin side by side with stock vLLM.",
        epilog="example: swa bench pages --quick",
    )
    _add_benchmarks(bench.add_subparsers(dest="bench", required=True), arguments)
    evaluate = commands.add_parser(
        "eval",
        help="measure what a window costs on a model and text of yours",
        description="Measure what a window costs on a model and text of yours.",
        epilog="example: swa eval ppl MODEL --text FILE --window full,256,128 --sink-tokens 0,4",
    )
    _add_evaluations(evaluate.add_subparsers(dest="eval", required=True))
    return parser


def _add_benchmarks(commands: Any, arguments: Sequence[str]) -> None:
    for name, (add_flags, example) in BENCHMARKS.items():
        parser = _add_command(commands, name, str(add_flags.__doc__), example, "bench ")
        add_flags(parser)
        parser.add_argument("--quick", action="store_true", help="smaller sizes, for two cores")
        add_plot_argument(parser)
        parser.set_defaults(run=partial(_run_benchmark, name, arguments))


def _run_benchmark(name: str, arguments: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run a file of ``bench/``, which imports torch and vLLM."""
    from swa_vllm.tools.bench import form

    module = import_module(f"swa_vllm.tools.bench.{name}")
    return form.run_benchmark(module, arguments, args)


def _add_evaluations(commands: Any) -> None:
    for name, (add_flags, example) in EVALUATIONS.items():
        parser = _add_command(commands, name, str(add_flags.__doc__), example, "eval ")
        add_flags(parser)
        parser.set_defaults(run=partial(_run_evaluation, name))
        quick = "a fraction of the work, for a first look"
        parser.add_argument("--quick", action="store_true", help=quick)


def _run_evaluation(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a file of ``eval/``, which imports vLLM."""
    figures: dict[str, Any] = import_module(f"swa_vllm.tools.eval.{name}").run(args)
    return figures


def _add_command(
    commands: Any,
    name: str,
    text: str,
    example: str,
    group: str = "",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> Parser:
    """Add a sub-command.

    Args:
        text: the help text; its first line is the summary.
        group: the words before ``name`` on the command line, each with a blank behind it.
        parents: have flags that the sub-command takes too, unless it has one of that name.
    """
    text = cleandoc(text)
    summary = text.splitlines()[0]
    parser: Parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=text,
        epilog=f"example: swa {group}{name} {example}",
        parents=parents,
        conflict_handler="resolve" if parents else "error",
    )
    parser.add_argument("--json", metavar="PATH", help='write the figures; "-" for stdout')
    return parser


if __name__ == "__main__":
    sys.exit(main())
