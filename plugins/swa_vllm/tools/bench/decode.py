"""Time of a decoded and of a prefilled token against the length of the text, in the engine."""

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from swa_backend.pages import ceil_div
from swa_backend.table import format_table
from swa_vllm.tools.bench.flags import CONTEXTS, QUICK_CONTEXTS
from swa_vllm.tools.bench.serving.arms import (
    SERVING_ARMS,
    serving_arms_of,
)
from swa_vllm.tools.bench.serving.checkpoints import prepare_checkpoints
from swa_vllm.tools.bench.serving.launcher import Launcher
from swa_vllm.tools.bench.serving.process import ArmProcess
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    check_number_arguments,
    numbers_of_tokens,
)
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.engines.setup import check_rope_can_grow, scoring_text_config

_COMPARED = 16  # tokens of each answer
_FIGURES = {"decode_s": "ms of a decoding step", "prefill_s": "us of a prompt token"}
_UNITS = {"decode_s": 1e3, "prefill_s": 1e6}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table for each figure, a row for each length; returns the figures."""
    names = (
        "window",
        "batch",
        "rounds",
        "block_size",
        "threads",
        "full_to",
        "max_num_batched_tokens",
    )
    check_number_arguments(args, names)
    check_number_argument("steps", args.steps, least=3)
    arms = serving_arms_of("--peers", args.peers)
    if "hf" in arms or "here" not in arms:
        raise ValueError(
            f"--peers {args.peers}: engines are compared with here, this plugin; name it, and "
            "stock or full beside it"
        )
    contexts = _benchmark_contexts(args)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        launcher = _launcher_of_decode_arms(args, Path(directory), contexts)
        started = {}
        for name, arm in arms.items():
            say(f"starting {arm.name}")
            longest = _benchmark_max_model_len(args, _contexts_of_arm(name, contexts, args.full_to))
            started[name] = stack.enter_context(launcher.start(arm, max_model_len=longest))
        figures = _time_decode_rounds(args, started, contexts)
    told = ("window", "batch", "dtype", "block_size", "rounds", "steps")
    result = {
        "model": str(args.model or "random weights"),
        **{name: getattr(args, name) for name in told},
        "chunk": args.max_num_batched_tokens,
        "cases": figures,
        "growth": _growth_with_length(figures),
    }
    _print_decode_times(result)
    return result


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the time of a decoding step by length, a line for each arm."""
    series: dict[str, list[tuple[float, float]]] = {}
    for case in figures["cases"]:
        series.setdefault(case["peer"], []).append(
            (case["context"], 1e3 * case["decode_s"]["median"])
        )
    plots.draw_lines(
        path, series, "tokens of context", "ms of a decoding step", log_x=True, from_zero=True
    )


def _benchmark_contexts(args: argparse.Namespace) -> list[int]:
    default = QUICK_CONTEXTS if args.quick else CONTEXTS
    text = args.contexts or default
    contexts = sorted(set(numbers_of_tokens("--contexts", text)))
    if contexts[0] > args.full_to:
        raise ValueError(f"--full-to {args.full_to} is below all of --contexts {text}; raise it")
    return contexts


def _contexts_of_arm(name: str, contexts: list[int], full_to: int) -> list[int]:
    return contexts if SERVING_ARMS[name].windowed else [n for n in contexts if n <= full_to]


def _benchmark_max_model_len(args: argparse.Namespace, contexts: list[int]) -> int:
    """Make room for the steps to time, and for what the first decodes while others prefill."""
    return (
        contexts[-1]
        + args.steps
        + 1
        + ceil_div(args.batch * contexts[-1], args.max_num_batched_tokens)
    )


def _launcher_of_decode_arms(
    args: argparse.Namespace, directory: Path, contexts: list[int]
) -> Launcher:
    longest = _benchmark_max_model_len(args, contexts)
    # The positions of random weights are few, so that its overriding is always at work.
    models = prepare_checkpoints(args.model, directory, args.window, contexts[0], args.seed)
    config = scoring_text_config(str(models[True]))
    engine: dict[str, Any] = {}
    if longest > config.max_position_embeddings:
        check_rope_can_grow(config, longest)
        engine["hf_overrides"] = {"max_position_embeddings": longest}
    most = _benchmark_max_model_len(args, _contexts_of_arm("full", contexts, args.full_to))
    engine |= {
        "block_size": args.block_size,
        # What full attention needs, for all, and what stock vLLM charges for a window beyond the
        # pages of a text: a page for each request. One is vLLM's own.
        "num_gpu_blocks_override": args.batch * (ceil_div(most, args.block_size) + 1) + 1,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_num_seqs": min(args.batch, args.max_num_batched_tokens),
        "enable_prefix_caching": False,
    }
    return Launcher(models, args.dtype, args.threads, engine)


def _time_decode_rounds(
    args: argparse.Namespace, started: Mapping[str, ArmProcess], contexts: list[int]
) -> list[dict[str, Any]]:
    once = serving_arms_of("--once", args.once)
    _warm_up_decode_benchmark(args, started, contexts[0])
    taken: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for index in range(args.rounds):
        for context in contexts:
            for name, process in started.items():
                if index and name in once:
                    continue
                if context in _contexts_of_arm(name, contexts, args.full_to):
                    say(f"round {index + 1} of {args.rounds}, {context} tokens, {process.name}")
                    answer = _decode_benchmark_ask(args, process, context, seed=args.seed + index)
                    taken.setdefault((name, context), []).append(answer)
    return [
        {
            "peer": SERVING_ARMS[name].name,
            "context": context,
            **{
                key: Spread.of_all([answer[key] for answer in answers]).to_json()
                for key in _FIGURES
            },
        }
        for (name, context), answers in sorted(taken.items(), key=lambda item: item[0][1])
    ]


def _decode_benchmark_ask(
    args: argparse.Namespace, process: ArmProcess, context: int, seed: int
) -> dict[str, Any]:
    answer: dict[str, Any] = process.ask(
        "decode", batch=args.batch, num_prompt=context, num_steps=args.steps, seed=seed
    )
    if answer["batch"] != args.batch:
        raise RuntimeError(f"{process.name} decoded {answer['batch']} of {args.batch} at once")
    return answer


def _warm_up_decode_benchmark(
    args: argparse.Namespace, started: Mapping[str, ArmProcess], context: int
) -> None:
    """Warm up, and compare the tokens of arms with the same window.

    Raises:
        RuntimeError: they differ in fp32; elsewhere rounding may decide.
    """
    say(f"comparing behind {context} tokens")
    answers = {
        name: _decode_benchmark_ask(args, process, context, seed=-1)
        for name, process in started.items()
    }
    first = {name: [row[:_COMPARED] for row in a["tokens"]] for name, a in answers.items()}
    if args.dtype == "float32" and first.get("stock", first["here"]) != first["here"]:
        raise RuntimeError("this plugin and stock vLLM decode other tokens in fp32")


def _growth_with_length(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Divide each arm's figures at its longest text by those at its shortest."""
    found = {}
    for name in dict.fromkeys(case["peer"] for case in cases):
        own = [case for case in cases if case["peer"] == name]
        found[name] = {k: own[-1][k]["median"] / own[0][k]["median"] for k in _FIGURES}
    return found


def _print_decode_times(figures: Mapping[str, Any]) -> None:
    first, *others = names = list(figures["growth"])
    print(
        f"\n{figures['model']}, {figures['batch']} requests, W={figures['window']}, "
        f"{figures['dtype']}, page {figures['block_size']}, chunk {figures['chunk']}"
    )
    for key, label in _FIGURES.items():
        rows: list[list[object]] = []
        for context in dict.fromkeys(case["context"] for case in figures["cases"]):
            found = {c["peer"]: c[key] for c in figures["cases"] if c["context"] == context}
            ratios = [
                found[first]["median"] / found[name]["median"] if name in found else None
                for name in others
            ]
            times = [
                Spread(**found[name]).text(_UNITS[key]) if name in found else None for name in names
            ]
            rows.append([str(context), *times, *ratios])
        growth = [f"{figures['growth'][name][key]:.2f}" for name in names]
        rows.append(["longest / shortest", *growth, *([None] * len(others))])
        header = (f"context, {label}", *names, *(f"here / {name}" for name in others))
        print("\n" + format_table(header, rows))
