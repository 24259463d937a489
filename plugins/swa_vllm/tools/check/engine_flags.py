"""The flags of vLLM's engine, as ``vllm serve`` reads them, beside those of ``swa check``."""

import argparse
from dataclasses import fields
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def engine_parser() -> argparse.ArgumentParser:
    """Make a parser of all of them, for a parser that has it as parent."""
    parser = FlexibleArgumentParser(add_help=False)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None)
    return parser


def given_engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of the engine that differ from vLLM's defaults."""
    defaults = engine_parser().parse_args([])
    names = [field.name for field in fields(EngineArgs) if field.name != "model"]
    return {
        name: getattr(args, name)
        for name in names
        if hasattr(defaults, name) and getattr(args, name) != getattr(defaults, name)
    }
