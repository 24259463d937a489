"""The flags of each benchmark, apart from what runs it: help imports neither torch nor vLLM."""

import argparse
from collections.abc import Callable
from pathlib import Path

from swa_vllm.tools.bench.serving.arms import SERVING_ARMS, add_arms_and_rounds_arguments
from swa_vllm.tools.bench.serving.workload import MIXES
from swa_vllm.tools.common.arguments import (
    add_phase_argument,
    add_sink_tokens_argument,
    add_window_size_argument,
)
from swa_vllm.tools.common.engine_arguments import add_engine_arguments

SHAPE_NAMES = ("Qwen3-8B", "Qwen3-0.6B")
CONTEXTS, QUICK_CONTEXTS = "2048,4096,8192,32768,131072", "512,1024,2048"
# Of a workload of the user's own in "pages".
OWN: dict[str, int | None] = {
    "window": None,
    "block_size": 16,
    "pool_tokens": 32768,
    "max_num_batched_tokens": 8192,
    "max_model_len": None,
    "steps_in_flight": 2,
    "prompt": 8000,
    "output": 512,
    "num_requests": 80,
}


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """A workload served by this plugin, stock vLLM, full attention and Hugging Face, in turns.

    Stock vLLM slides all layers, so all slide here; full attention is vLLM's. The three get a pool
    of the same bytes, which by default holds two longest requests of full attention. Hugging Face
    has no pool: it takes --hf-batch requests at a time, padded on the left, with the same windows.
    Before anything is timed the arms' greedy tokens are compared in fp32. "Bound" is the time in
    which an engine of the step times measured here could serve the workload with as many requests
    at once as windows fit into the pool. With --phase prefill, in this plugin only prompts have the
    window: it holds every page, and gains time to first token. With --phase decode only answers
    have it: a request holds its prompt and a window, which long answers to short prompts gain by
    (--mix reasoning). A trace has a line for each request:

        {"arrival": 0.5, "prompt_tokens": 300, "output_tokens": 64}
    """
    add_arms_and_rounds_arguments(parser, ",".join(SERVING_ARMS), rounds=2)
    add_window_size_argument(parser, 128)
    add_phase_argument(parser, "whose tokens have the window in this plugin")
    parser.add_argument(
        "--mix", choices=tuple(MIXES), default="decode", help="lengths of prompts and answers"
    )
    parser.add_argument("--trace", type=Path, metavar="PATH", help="JSON lines, instead of a mix")
    _add_number(parser, "num-requests", 16, "requests of a mix")
    _add_number(
        parser,
        "pool-requests",
        2,
        "longest requests of full attention that the pool holds; 0: room for all",
    )
    _add_number(parser, "hf-batch", 8, "requests that Hugging Face takes at a time")


def _add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Time of a decoded and of a prefilled token against the length of the text, in the engine.

    This plugin, stock vLLM with all layers sliding, and full attention decode a fixed batch behind
    prompts of each length, in turns; full attention up to --full-to only, as its prompts take long.
    In fp32 the first two must decode the same tokens. Texts longer than the model's positions raise
    max_position_embeddings. Scheduler and attention at a million tokens: swa bench overhead.
    """
    add_arms_and_rounds_arguments(parser, "here,stock,full", rounds=3)
    add_window_size_argument(parser, 512)
    parser.add_argument(
        "--contexts",
        metavar="TOKENS,...",
        help=f"lengths of the prompts (default: {CONTEXTS}; with --quick {QUICK_CONTEXTS})",
    )
    _add_number(parser, "full-to", 32768, "longest prompt of full attention, in tokens", "TOKENS")
    _add_number(parser, "batch", 2, "requests that decode")
    _add_number(parser, "steps", 64, "decoding steps to time")


def _add_pages_arguments(parser: argparse.ArgumentParser) -> None:
    """Pages a request holds, and requests that run, on vLLM's real scheduler without a model.

    Full attention, stock vLLM's sliding window and this plugin serve the same requests, all there
    at the start, from the same pool. "Estimate" is the "maximum concurrency" that vLLM prints at
    start; it assumes requests of max_model_len. "Running" is what ran, on average over the steps.
    "Promised" is what admission reserves for a request of max_model_len, "held" the most that one
    request had.
    """
    add_window_size_argument(parser, None, "none: the built-in workloads run")
    add_engine_arguments(
        parser,
        block_size=f"{OWN['block_size']}",
        max_num_batched_tokens=f"{OWN['max_num_batched_tokens']}",
        max_model_len="prompt + output",
    )
    for name, text in (
        ("pool_tokens", "tokens of full attention that the pool holds"),
        ("steps_in_flight", "steps scheduled ahead, 1 or 2"),
        ("prompt", "tokens of each prompt"),
        ("output", "tokens of each answer"),
        ("num_requests", "requests, all there at the start"),
    ):
        _add_number(parser, name.replace("_", "-"), None, f"{text} (default: {OWN[name]})")
    parser.add_argument(
        "--prefix-caching", action="store_true", help="with vLLM's prefix cache (default: without)"
    )


def _add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Time of a prefill chunk in one sliding layer that stores survivors only, beside stock vLLM's.

    Stock vLLM stores every page of the chunk. The layer has a real model's shapes and random
    weights. Both must give the same output before anything is timed. "Attention" is storing keys
    and values and attending to them; "layer" adds the layer's projections and MLP, which are the
    same for both.

    With --phase prefill the layer has its window in the prompt only and stores every page. All
    chunks of a prompt are timed beside full attention's, and then a decoding step, which sees
    everything. "3 of 4 layers" is a model of which every fourth layer is full.
    """
    _add_shape(parser)
    add_window_size_argument(parser, 1024)
    add_engine_arguments(parser, max_num_batched_tokens="2048; with --quick 1024")
    _add_number(parser, "rounds", 5, "times that each is timed")
    add_phase_argument(parser)
    _add_number(parser, "prompt", 32768, "tokens of the prompt, with --phase prefill", "TOKENS")


def _add_sinks_arguments(parser: argparse.ArgumentParser) -> None:
    """Time of decoding and prefill in one sliding layer with sink tokens, beside the plain window.

    The plain window is stock vLLM's attention. The layer has a real model's shapes and random
    weights; before anything is timed its output must be that of plain torch. "Attention" is storing
    keys and values and attending to them; "layer" adds the layer's projections and MLP, the same
    for both.
    """
    _add_shape(parser)
    add_window_size_argument(parser, 1024)
    add_sink_tokens_argument(parser, 4)
    parser.add_argument(
        "--shift", action="store_true", help="with the option position_shift (default: without)"
    )
    _add_number(parser, "rounds", 5, "times that each is timed")


def _add_overhead_arguments(parser: argparse.ArgumentParser) -> None:
    """Processor time of scheduler, page manager and metadata builder per step, beside stock vLLM's.

    Batches of decoding requests, at several context lengths: what a step costs on top of the model.
    The attention of one layer is beside it, whose outputs must be equal; it is no part of the sum.
    At a million tokens prefix caching is off only.

    A second table has the host's time on GPUs: builder and attention of a layer over this project's
    Triton kernels, beside vLLM's TRITON_ATTN, without the launches. It is measured without a GPU.
    """
    add_window_size_argument(parser, 512)
    _add_number(parser, "batch", 32, "decoding requests")
    _add_number(parser, "rounds", 100, "times that each is timed")


def _add_kernels_arguments(parser: argparse.ArgumentParser) -> None:
    """Attention kernels on a GPU, beside vLLM's own, FlashInfer's and xformers'; or what they do.

    On a GPU each must first give the oracle's output; then the median of CUDA graph replays is
    taken, decode's merge included, with keys that no cache holds. Without a GPU nothing is timed:
    the figures are what a launch on an H100 reads and starts, and what the kernels compile to.
    """
    parser.add_argument(
        "--shape", choices=SHAPE_NAMES, default="Qwen3-8B", help="whose heads the kernels have"
    )


def _add_number(
    parser: argparse.ArgumentParser, name: str, default: int | None, text: str, unit: str = "N"
) -> None:
    parser.add_argument(f"--{name}", type=int, default=default, metavar=unit, help=text)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        choices=SHAPE_NAMES,
        help="whose layer is timed (default: Qwen3-8B; with --quick Qwen3-0.6B)",
    )


# By benchmark what adds its flags, whose docstring is the help text, and an example.
BENCHMARKS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "serve": (
        _add_serve_arguments,
        "Qwen3-0.6B --window 128 --mix decode --pool-requests 2 --json serve.json",
    ),
    "decode": (_add_decode_arguments, "--window 512 --contexts 2048,4096,32768 --batch 4"),
    "pages": (
        _add_pages_arguments,
        "--window 1024 --block-size 16 --prompt 32000 --output 512 --num-requests 80",
    ),
    "prefill": (
        _add_prefill_arguments,
        "--shape Qwen3-8B --window 1024 --max-num-batched-tokens 2048",
    ),
    "sinks": (_add_sinks_arguments, "--shape Qwen3-8B --window 1024 --sink-tokens 4"),
    "overhead": (_add_overhead_arguments, "--batch 32"),
    "kernels": (_add_kernels_arguments, "--shape Qwen3-8B --json kernels.json"),
}
