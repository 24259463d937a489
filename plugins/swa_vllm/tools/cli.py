"""The ``swa`` command."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    if "vllm" not in sys.modules:
        # vLLM's own start-up lines would bury a tool's output; set it to see them.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(prog="swa", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser(
        "bench",
        help="measure this plugin side by side with stock vLLM",
        description="Measure this plugin side by side with stock vLLM.",
        epilog="example: swa bench pages --quick",
    )
    _add_benchmarks(bench.add_subparsers(dest="bench", required=True))
    evaluate = commands.add_parser(
        "eval",
        help="measure what a window costs on a model and text of yours",
        description="Measure what a window costs on a model and text of yours.",
        epilog="example: swa eval ppl MODEL --text FILE --windows full,256,128 --sinks 0,4",
    )
    _add_evaluations(evaluate.add_subparsers(dest="eval", required=True))
    args = parser.parse_args(arguments)
    try:
        # Figures alone where a program reads them.
        with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):
            result = args.run(args)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        text = json.dumps(result, indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    return 0


def _add_benchmarks(commands: Any) -> None:
    # Here, because they import vLLM, which reads its environment then.
    from swa_vllm.tools import (
        bench_kernels,
        bench_overhead,
        bench_pages,
        bench_prefill,
        bench_sinks,
    )

    modules = (bench_pages, bench_prefill, bench_sinks, bench_overhead, bench_kernels)
    _add_modules(commands, "bench", modules, "smaller sizes, for two cores")


def _add_evaluations(commands: Any) -> None:
    from swa_vllm.tools import eval_layers, eval_needle, eval_ppl, eval_stream

    modules = (eval_ppl, eval_needle, eval_stream, eval_layers)
    _add_modules(commands, "eval", modules, "a fraction of the work, for a first look")


def _add_modules(commands: Any, group: str, modules: Iterable[Any], quick: str) -> None:
    for module in modules:
        name = module.__name__.rpartition("_")[2]
        summary = str(module.__doc__).strip().splitlines()[0]
        parser = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=module.__doc__,
            epilog=f"example: swa {group} {name} {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--json", metavar="PATH", help='write the figures; "-" for stdout')
        parser.add_argument("--quick", action="store_true", help=quick)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
