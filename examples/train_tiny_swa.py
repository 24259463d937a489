"""Train a tiny Qwen3 from scratch with its sliding window in the training mask.

    python examples/train_tiny_swa.py TEXT OUT_DIR [--window 64] [--max-window-layers 0]

3.7 million parameters; 300 steps took 15 minutes of CPU time on one core (AVX2, a busy machine).
The two checkpoints in ``tests/data`` were made from the King James Bible without the Acts of the
Apostles, which are held out; ``sed`` takes the verse references off, which are no prose::

    apt-get install bible-kjv
    bible -f gen1:1-mal4:6 mat1:1-joh21:25 rom1:1-rev22:21 | sed 's/^[^ ]* //' > train.txt
    export OMP_NUM_THREADS=1
    python examples/train_tiny_swa.py train.txt tests/data/tiny-swa-sliding
    python examples/train_tiny_swa.py train.txt tests/data/tiny-swa-mixed --max-window-layers 2
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
NUM_LAYERS = 4
TRAINED_LENGTH = 512  # tokens of one training example
BATCH_SIZE = 4
MUON_LR = 0.02  # the layers' matrices
MOMENTUM = 0.95
ADAMW_LR = 3e-3  # the embedding and the norms
DECAYING_PART = 0.5  # of the steps, linearly to zero; flat before
REPORT_EVERY = 25  # steps


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB_SIZE`` entries, or fewer where the text has no more pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def make_config(window: int, max_window_layers: int) -> Qwen3Config:
    """Four layers; those from ``max_window_layers`` on slide.

    Raises:
        ValueError: a window that no training example exceeds, or no layer that slides.
    """
    if not 1 <= window < TRAINED_LENGTH:
        raise ValueError(
            f"window must be 1 to {TRAINED_LENGTH - 1} tokens, got {window}: training examples "
            f"have {TRAINED_LENGTH}, so a longer window would not be trained"
        )
    if not 0 <= max_window_layers < NUM_LAYERS:
        raise ValueError(
            f"max_window_layers must be 0 to {NUM_LAYERS - 1}, got {max_window_layers}: the model "
            f"has {NUM_LAYERS} layers, and at least the last one has to slide"
        )
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=TRAINED_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=max_window_layers,
        bos_token_id=None,
        eos_token_id=0,
    )


class Muon:
    """Muon (https://kellerjordan.github.io/posts/muon/) in fp32, matrices of one shape at once.

    ``torch.optim.Muon`` computes in bfloat16, which most CPUs emulate: there it takes several
    times as long as forward and backward together.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter]) -> None:
        by_shape = defaultdict[torch.Size, list[torch.nn.Parameter]](list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._groups = [
            (group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix by its gradient, with Nesterov momentum, and drop the gradient."""
        for group, momentum in self._groups:
            grads = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(grads, 1 - MOMENTUM)
            updates = orthogonalize(grads.lerp(momentum, MOMENTUM))
            rows, columns = updates.shape[1:]
            for parameter, update in zip(group, updates, strict=True):
                parameter.sub_(update, alpha=lr * max(1, rows / columns) ** 0.5)
                parameter.grad = None


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices of the same singular vectors, with singular values near 1, ``[n, rows, columns]``.

    Five steps of the Newton-Schulz iteration with the coefficients of the Muon post.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    x: torch.Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def lr_factor(step: int, steps: int) -> float:
    """Learning rate of ``step`` as a part of the first one's."""
    return min(1.0, (steps - step) / (DECAYING_PART * steps))


def train(model: Qwen3ForCausalLM, tokens: torch.Tensor, steps: int) -> list[float]:
    """Next-token training on random stretches of a text; the mask is that of the model's config.

    Args:
        tokens: int64 ``[num_tokens]``, more than ``TRAINED_LENGTH``.

    Returns:
        Loss of every step, in nats a token.
    """
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else rest).append(parameter)
    muon, adamw = Muon(matrices), torch.optim.AdamW(rest, weight_decay=0.0)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - TRAINED_LENGTH, (BATCH_SIZE, 1))
        batch = tokens[starts + torch.arange(TRAINED_LENGTH)]  # [BATCH_SIZE, TRAINED_LENGTH]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        factor = lr_factor(step, steps)
        muon.step(MUON_LR * factor)
        adamw.param_groups[0]["lr"] = ADAMW_LR * factor
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
        if len(losses) % REPORT_EVERY == 0 or len(losses) == steps:
            recent = losses[-REPORT_EVERY:]
            seconds = time.monotonic() - start
            mean = sum(recent) / len(recent)
            print(f"step {len(losses)}/{steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    return losses


def make_checkpoint(
    text: str, out_dir: Path, *, window: int, max_window_layers: int, steps: int, seed: int
) -> list[float]:
    """Train on ``text`` and write weights in bf16 and the tokenizer to ``out_dir``.

    Returns:
        Loss of every step, in nats a token.

    Raises:
        ValueError: too short a text, or what :func:`make_config` refuses.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    config = make_config(window, max_window_layers)
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    if len(tokens) <= TRAINED_LENGTH:
        raise ValueError(
            f"the text has {len(tokens)} tokens; more than {TRAINED_LENGTH} are needed"
        )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text", flush=True)
    losses = train(model, tokens, steps)
    model.bfloat16().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return losses


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train a tiny Qwen3 with its window.")
    parser.add_argument("text", type=Path, help="training text, UTF-8")
    parser.add_argument("out_dir", type=Path, help="checkpoint to write; must not exist")
    parser.add_argument("--window", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--max-window-layers",
        type=int,
        default=0,
        help="the first N layers keep full attention (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.out_dir.exists():
        parser.error(f"{args.out_dir} exists; remove it or name another directory")
    try:
        make_checkpoint(
            args.text.read_text(encoding="utf-8"),
            args.out_dir,
            window=args.window,
            max_window_layers=args.max_window_layers,
            steps=args.steps,
            seed=args.seed,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
