"""Training and inference with one mask: perplexity of a model under its own and other windows.

    python examples/consistency.py [--model DIR] [--text FILE] [--lengths 512 2048]

The model is served with the window it was trained with, with half and double of it, and with full
attention in every layer; layers that the checkpoint keeps full stay full. The text is cut into
pieces of each length, and every token but a piece's first is predicted. By default this is the
tiny model of ``train_tiny_swa.py``, which was trained on pieces of 512 tokens, on text that was
held out. A length beyond the trained one raises ``max_position_embeddings``, from which vLLM sizes
its RoPE table; sliding layers see no distance that they were not trained on, full layers do.
"""

import argparse
import gc
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

DATA = Path(__file__).parents[1] / "tests" / "data"


class ConsistencyError(ValueError):
    """Nothing can be compared with what was given."""


def window_options(window: int) -> dict[str, dict[str, Any]]:
    """The ``swa`` options of each row, for a checkpoint trained with ``window``."""
    return {
        f"own window, {window}": {},
        f"half, {window // 2}": {"window": window // 2},
        f"double, {2 * window}": {"window": 2 * window},
        "full attention": {"enabled": False},
    }


def engine_arguments(hf_config: Any, length: int) -> dict[str, Any]:
    """Arguments of ``LLM`` to score pieces of ``length`` tokens."""
    max_model_len = length + 1  # the engine always generates a token
    arguments: dict[str, Any] = {"dtype": "float32", "max_model_len": max_model_len}
    if hf_config.max_position_embeddings < max_model_len:
        arguments["hf_overrides"] = {"max_position_embeddings": max_model_len}
    return arguments


def cut(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Whole pieces of ``length`` tokens; what is left over is dropped."""
    return [list(tokens[i : i + length]) for i in range(0, len(tokens) - length + 1, length)]


def perplexity(llm: Any, pieces: Sequence[Sequence[int]]) -> float:
    """Perplexity that a vLLM engine gives ``pieces``, all their tokens but the first ones."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(piece)} for piece in pieces],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    logprobs = [
        scores[token].logprob
        for piece, output in zip(pieces, outputs, strict=True)
        for token, scores in zip(piece[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def compare(model: Path, text: str, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Perplexities of each row of :func:`window_options`, one a length.

    Raises:
        ConsistencyError: no checkpoint, one without a window to halve, or a text shorter than a
            piece.
    """
    if not (model / "config.json").is_file():
        raise ConsistencyError(f"{model} is no checkpoint: it has no config.json")
    hf_config = AutoConfig.from_pretrained(model)
    window = getattr(hf_config, "sliding_window", None)
    if not window or window < 2:
        raise ConsistencyError(
            f"{model} has sliding_window={window}; give a checkpoint trained with a window of 2 "
            "tokens or more"
        )
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    longest = max(lengths)
    if min(lengths) < 2 or longest > len(tokens):
        raise ConsistencyError(
            f"lengths must be 2 to {len(tokens)}, the tokens of the text; got {lengths}"
        )
    tokens = tokens[: len(tokens) // longest * longest]  # the same for every length
    rows: dict[str, list[float]] = {}
    for name, options in window_options(window).items():
        llm = start_engine(model, options, engine_arguments(hf_config, longest))
        rows[name] = [perplexity(llm, cut(tokens, length)) for length in lengths]
        del llm
        free_engine()
    return rows


def start_engine(model: Path, options: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """An engine in this process."""
    from vllm import LLM

    return LLM(
        str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        additional_config={"swa": options},
        **arguments,
    )


def free_engine() -> None:
    """Free what the engine that was just dropped leaves in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Perplexity under the trained and other windows.")
    parser.add_argument("--model", type=Path, default=DATA / "tiny-swa-sliding")
    parser.add_argument("--text", type=Path, default=DATA / "acts-1-7.txt", help="UTF-8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on GPUs
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one engine after the other
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        rows = compare(args.model, args.text.read_text(encoding="utf-8"), args.lengths)
    except (OSError, ConsistencyError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.model.name} on {args.text.name}, perplexity")
    print(f"{'served with':<20}" + "".join(f"{f'{n} tokens':>14}" for n in args.lengths))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{value:14.4f}" for value in row))


if __name__ == "__main__":
    main()
