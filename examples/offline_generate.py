"""Offline batch: LLM.generate over prompts with a windowed model.

python examples/offline_generate.py [--model DIR] [--window W] [--full-attention-layers every:4]

Without --model it makes the demo model first, once: 90 MB to download, half a minute. Messages of
"padding layers" at start and of "force killing" at the end are vLLM's own, and harmless.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from make_demo_model import ensure_demo_model

QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Why is the sky blue?",
    "Write one sentence about the moon.",
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Answer a batch of prompts with a window.")
    parser.add_argument("--model", help="checkpoint (default: the demo model's mixed variant)")
    parser.add_argument("--window", type=int, help="tokens a sliding layer sees")
    parser.add_argument("--full-attention-layers", help='such as "0-3,27" or "every:4"')
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    model = args.model or str(ensure_demo_model(Path(".cache/demo"))["mixed"])
    options: dict[str, Any] = {
        "window": args.window,
        "full_attention_layers": args.full_attention_layers,
    }

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on GPUs
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=2048,
        enforce_eager=True,
        additional_config={"swa": {k: v for k, v in options.items() if v is not None}},
    )
    # Without its chat template an instruct model often answers nothing.
    as_chat = partial(
        llm.get_tokenizer().apply_chat_template, tokenize=False, add_generation_prompt=True
    )
    prompts = [as_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=args.max_tokens))
    seconds = time.perf_counter() - start
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question}\n  -> {output.outputs[0].text.strip()}")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} tokens/s")


# The engine's worker processes import this file again.
if __name__ == "__main__":
    main()
