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
from pathlib import Path
from types import ModuleType
from typing import Any

from swa_vllm.tools.common.arguments import check_output_path, error_text

# Each is ``<verb>/command.py``, a file of ``bench/`` or a file of ``eval/``, by its very name.
_VERBS = ("plan", "check", "trace")
_BENCHMARKS = ("serve", "decode", "pages", "prefill", "sinks", "overhead", "kernels")
_EVALUATIONS = ("ppl", "needle", "stream", "layers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "vllm" not in sys.modules:
        # vLLM's own start-up lines would bury a tool's output; set it to see them.
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(level)  # for what it logs before it reads that
    try:
        args = _command_parser(arguments).parse_args(arguments)
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


def _command_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swa", description=__doc__, epilog="example: swa check Qwen3-8B --window 4096"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _VERBS:
        _add_command(commands, name, _import_command(f"{name}.command"))
    bench = commands.add_parser(
        "bench",
        help="measure this plugin side by side with stock vLLM",
        description="Measure this plugin side by side with stock vLLM.",
        epilog="example: swa bench pages --quick",
    )
    evaluate = commands.add_parser(
        "eval",
        help="measure what a window costs on a model and text of yours",
        description="Measure what a window costs on a model and text of yours.",
        epilog="example: swa eval ppl MODEL --text FILE --windows full,256,128 --sinks 0,4",
    )
    # These import vLLM, which other commands do without and which reads its environment then.
    if arguments[:1] == ["bench"]:
        _add_benchmarks(bench.add_subparsers(dest="bench", required=True), arguments)
    elif arguments[:1] == ["eval"]:
        _add_evaluations(evaluate.add_subparsers(dest="eval", required=True))
    return parser


def _add_benchmarks(commands: Any, arguments: Sequence[str]) -> None:
    from swa_vllm.tools.bench import form
    from swa_vllm.tools.common import plots

    for name in _BENCHMARKS:
        module = _import_command(f"bench.{name}")
        parser = _add_command(commands, name, module, "bench ")
        parser.add_argument("--quick", action="store_true", help="smaller sizes, for two cores")
        plots.add_plot_argument(parser)
        parser.set_defaults(run=partial(form.run_benchmark, module, arguments))


def _add_evaluations(commands: Any) -> None:
    for name in _EVALUATIONS:
        parser = _add_command(commands, name, _import_command(f"eval.{name}"), "eval ")
        quick = "a fraction of the work, for a first look"
        parser.add_argument("--quick", action="store_true", help=quick)


def _import_command(name: str) -> ModuleType:
    return import_module(f"swa_vllm.tools.{name}")


def _add_command(
    commands: Any, name: str, module: ModuleType, group: str = ""
) -> argparse.ArgumentParser:
    """Add a sub-command that ``module`` describes.

    Args:
        module: has ``add_arguments``, ``run`` and ``EXAMPLE``; its docstring is the help text.
        group: the words before ``name`` on the command line, each with a blank behind it.
    """
    summary = str(module.__doc__).strip().splitlines()[0]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=module.__doc__,
        epilog=f"example: swa {group}{name} {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="PATH", help='write the figures; "-" for stdout')
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
