"""Compare what ``swa tune`` chose with random plans that take as many bytes.

    python examples/random_plans.py MODEL REQUESTS FIGURES --block-size 32 --json OUT [--plot PNG]

FIGURES is what ``swa tune --budget ... --json`` wrote of the same model and requests. A random plan
keeps a random number of random layers full, and has the widest window within the budget and the
sinks of the choice. All plans are scored on one held-out request, and the best of them, with the
choice, on other held-out requests, which did not pick them. Scores are Hugging Face's, under a mask
for each layer: a plan then needs no engine of its own. ``examples/README.md`` has the result.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from swa_backend.checkpoint import read_checkpoint
from swa_backend.reference import reference_mask
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.progress import progress_bar
from swa_vllm.tools.common.sizing import longest_text_in_limits
from swa_vllm.tools.engines.setup import resolve_scoring_options, scoring_text_config
from swa_vllm.tools.tune.candidates import FULL, Candidate, Layout
from swa_vllm.tools.tune.command import sizer_of
from swa_vllm.tools.tune.layouts import widest_window
from swa_vllm.tools.tune.requests import Request, read_requests, split_requests
from swa_vllm.tools.tune.sizes import Sizer

CHOICE = "the choice"


class DenseModel:
    """A Qwen3 whose layers have windows by their masks alone."""

    def __init__(self, model: str, dtype: str = "auto") -> None:
        self._model: Any = Qwen3ForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def loss(self, candidate: Candidate, request: Request) -> float:
        """Sum the loss over an answer, in nats."""
        model, num_prompt, length = self._model, len(request.prompt), len(request.tokens)
        windows = candidate.windows(model.config.num_hidden_layers)
        model.config.layer_types = [str(window) for window in windows]
        masks = {str(window): _mask(length, window, candidate.sinks) for window in set(windows)}
        ids = torch.tensor([request.tokens])
        hidden = model.model(ids, attention_mask=masks, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[0, num_prompt - 1 : -1]).float().log_softmax(-1)
        return -float(logits.gather(1, torch.tensor(request.answer)[:, None]).double().sum())


def _mask(length: int, window: int | None, sinks: int) -> torch.Tensor:
    """Whether a query sees a key, ``[1, 1, length, length]``."""
    places = torch.arange(length)
    return reference_mask(places, places, window, sinks)[None, None]


def random_plans(
    sizer: Sizer, sinks: int, limit: int, num_plans: int, seed: int
) -> list[Candidate]:
    """Draw plans that differ, each with the widest window that ``limit`` bytes hold."""
    longest = sizer.limits.max_model_len - sinks
    layouts = [Layout(0, sinks, count) for count in range(sizer.num_layers)]
    widest = [
        replace(layout, window=widest_window(sizer, layout, longest, limit)) for layout in layouts
    ]
    able = [layout for layout in widest if layout.window]
    generator, plans = random.Random(seed), dict[Candidate, None]()  # noqa: S311 (to repeat it)
    for _ in range(100 * num_plans):
        layers = generator.sample(range(sizer.num_layers), sizer.num_layers)
        plans[generator.choice(able).with_full_layers(layers)] = None
        if len(plans) == num_plans:
            return list(plans)
    raise ValueError(f"the budget has room for {len(plans)} plans only; ask for fewer --plans")


def rise_of(
    model: DenseModel, candidate: Candidate, requests: Sequence[Request], full: Mapping[int, float]
) -> float:
    """Compute the rise of the loss over full attention, in nats a token."""
    losses = [model.loss(candidate, request) - full[request.line] for request in requests]
    return sum(losses) / sum(len(request.answer) for request in requests)


def candidate_of(options: Mapping[str, Any], hf_config: Any) -> Candidate:
    """Read ``swa`` options as a candidate that names the window of each layer.

    Raises:
        ValueError: they have no window, or one in a phase only.
    """
    if "window" not in options or "phase" in options:
        raise ValueError(f"{options} has no window for both phases, so there is nothing to compare")
    windows = resolve_scoring_options(hf_config, options).windows
    by_layer = tuple(window or 0 for window in windows)
    return Candidate(max(by_layer), options.get("sink_tokens", 0), by_layer=by_layer)


def compare(
    model: DenseModel,
    choice: Candidate,
    plans: Sequence[Candidate],
    held_out: Sequence[Request],
    num_best: int,
) -> tuple[dict[Candidate, float], dict[Candidate, float]]:
    """Score all on the first request, and the choice and the best on the others."""
    first, *others = held_out
    full = {r.line: model.loss(FULL, r) for r in progress_bar(held_out, "requests")}
    bar = progress_bar([choice, *plans], "plans")
    on_first = {plan: rise_of(model, plan, [first], full) for plan in bar}
    best = sorted(plans, key=lambda plan: on_first[plan])[:num_best]
    bar = progress_bar([choice, *best], "the best plans")
    return on_first, {plan: rise_of(model, plan, others, full) for plan in bar}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint's directory")
    parser.add_argument("requests", type=Path, help="the requests that swa tune was given")
    parser.add_argument("figures", type=Path, help="what swa tune --json wrote")
    parser.add_argument("--block-size", type=int, required=True, help="as swa tune had it")
    parser.add_argument("--plans", type=int, default=200, help="random plans (200)")
    parser.add_argument("--best", type=int, default=8, help="how many meet other requests (8)")
    parser.add_argument("--others", type=int, default=3, help="how many other requests (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the plans (0)")
    parser.add_argument("--json", type=Path, required=True, help="the figures to write")
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    return parser.parse_args()


def main() -> None:
    """Score the plans, print where the choice stands, write the figures."""
    args = arguments()
    tuned = json.loads(args.figures.read_text())
    tokenizer, checkpoint = (
        AutoTokenizer.from_pretrained(args.model),
        read_checkpoint(Path(args.model)),
    )
    requests = read_requests(args.requests, tokenizer, longest_text_in_limits(checkpoint))
    split = split_requests(requests, tuned["seed"])
    if [request.line for request in split.held_out] != tuned["held_out"]:
        raise SystemExit(f"{args.figures} is of other requests than {args.requests}; give its own")

    hf_config = scoring_text_config(args.model)
    sizes = argparse.Namespace(block_size=args.block_size, dtype="auto", kv_memory=None)
    sizer = sizer_of(sizes, checkpoint, hf_config, split)
    full_bytes = sizer.gain(FULL).num_bytes
    arm = tuned["arms"][CHOICE]
    choice = candidate_of(arm["additional_config"]["swa"], hf_config)
    limit = int(tuned["budget"] * full_bytes)
    plans = random_plans(sizer, choice.sinks, limit, args.plans, args.seed)
    held_out = split.held_out[: 1 + args.others]
    first, others = compare(DenseModel(args.model), choice, plans, held_out, args.best)

    ranked = sorted(plans, key=lambda plan: first[plan])
    num_better = sum(first[plan] < first[choice] for plan in plans)
    best = min(ranked[: args.best], key=lambda plan: others[plan])
    print(
        f"{num_better} of {len(plans)} random plans lose less than the choice on request "
        f"{held_out[0].line}; on {len(held_out) - 1} others the choice loses "
        f"{others[choice]:+.4f} nats a token, the best of {args.best} random plans "
        f"{others[best]:+.4f}"
    )

    def figures_of(plan: Candidate) -> dict[str, Any]:
        return {
            "additional_config": {"swa": plan.options()},
            "part_of_bytes": sizer.num_bytes(plan) / full_bytes,
            "rise_on_first": first[plan],
            "rise_on_others": others.get(plan),
        }

    figures = {
        "command": " ".join(["python", "examples/random_plans.py", *sys.argv[1:]]),
        "first": held_out[0].line,
        "others": [request.line for request in held_out[1:]],
        "num_better": num_better,
        "choice": figures_of(choice),
        "tuned": tuned["arms"],
        "random": [figures_of(plan) for plan in ranked],
    }
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        shares = [(first[plan], (at + 1) / len(plans)) for at, plan in enumerate(ranked)]
        chosen = [(first[choice], 0.0), (first[choice], 1.0)]
        plots.draw_lines(
            args.plot,
            {"random plans of as many bytes": shares, "the choice of swa tune": chosen},
            "rise of the loss on a held-out request, nats a token",
            "part of the plans that lose less",
            marks=False,
        )


if __name__ == "__main__":
    main()
