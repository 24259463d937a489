"""Fine-tune a stock Qwen3 with a sliding window in its training mask.

    python examples/finetune_window.py MODEL TEXT OUT_DIR [--window 128] [--steps 60]

What is trained are the weights of attention and the norms, by AdamW; the rest stays as it is. The
checkpoint that is written slides by its own ``config.json``: vLLM needs no option for it.
``examples/README.md`` has an example of 8 minutes, and what it gains.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

LENGTH_IN_WINDOWS = 4  # of a training example: most of its tokens have lost something
LEARNING_RATE = 2e-4
WARM_UP_STEPS = 5
REPORT_EVERY = 5  # steps


def with_window(config: Qwen3Config, window: int) -> Qwen3Config:
    """The config of the same model with a window in every layer.

    Raises:
        ValueError: no window, or one that no training example exceeds.
    """
    longest = config.max_position_embeddings // LENGTH_IN_WINDOWS
    if not 1 <= window <= longest:
        raise ValueError(
            f"window must be 1 to {longest} tokens, got {window}: training examples have "
            f"{LENGTH_IN_WINDOWS} windows, and the model {config.max_position_embeddings} positions"
        )
    changed = config.to_dict() | {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * config.num_hidden_layers,
    }
    return Qwen3Config.from_dict(changed)


def trained_parameters(model: Qwen3ForCausalLM) -> list[torch.nn.Parameter]:
    """Parameters of attention and norms, the only ones that are trained."""
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name or "norm" in name)
        if parameter.requires_grad:
            trained.append(parameter)
    return trained


def lr_factor(step: int, steps: int) -> float:
    """Learning rate of ``step`` as a part of the highest: a short way up, then down to zero."""
    return min((step + 1) / WARM_UP_STEPS, (steps - step) / steps)


def train(model: Qwen3ForCausalLM, tokens: torch.Tensor, window: int, steps: int) -> list[float]:
    """Next-token training on random stretches of a text; the mask is that of the model's config.

    Args:
        tokens: int64 ``[num_tokens]``, more than a training example has.

    Returns:
        Loss of every step, in nats a token.
    """
    length = LENGTH_IN_WINDOWS * window
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=0.0)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(steps):
        first = int(torch.randint(len(tokens) - length + 1, ()))
        batch = tokens[None, first : first + length]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * lr_factor(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % REPORT_EVERY == 0 or len(losses) == steps:
            recent = losses[-REPORT_EVERY:]
            mean, seconds = sum(recent) / len(recent), time.monotonic() - start
            print(f"step {len(losses)}/{steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    return losses


def finetune(model: Path, text: str, out_dir: Path, *, window: int, steps: int) -> list[float]:
    """Train ``model`` on ``text`` and write it, in its own dtype, to ``out_dir``.

    Returns:
        Loss of every step, in nats a token.

    Raises:
        ValueError: no checkpoint of a dense Qwen3, too short a text, or nonsense for a number.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is no checkpoint: it has no config.json")
    stock = Qwen3Config.from_pretrained(model)
    if stock.model_type != "qwen3":
        raise ValueError(f"{model} is a {stock.model_type}; this example trains qwen3 only")
    config = with_window(stock, window)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(tokens) < LENGTH_IN_WINDOWS * window:
        raise ValueError(
            f"the text has {len(tokens)} tokens; a training example needs "
            f"{LENGTH_IN_WINDOWS * window}"
        )
    torch.manual_seed(0)
    trained = Qwen3ForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    losses = train(trained, tokens, window, steps)
    trained.to(stock.dtype or torch.float32).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return losses


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a Qwen3 with a window.")
    parser.add_argument("model", type=Path, help="checkpoint of a dense Qwen3")
    parser.add_argument("text", type=Path, help="training text, UTF-8")
    parser.add_argument("out_dir", type=Path, help="checkpoint to write; must not exist")
    parser.add_argument("--window", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.out_dir.exists():
        parser.error(f"{args.out_dir} exists; remove it or name another directory")
    try:
        text = args.text.read_text(encoding="utf-8")
        finetune(args.model, text, args.out_dir, window=args.window, steps=args.steps)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
