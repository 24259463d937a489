"""The figures of a plan, as text and as JSON."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from swa_backend.window import Phase
from swa_vllm.compat import envs
from swa_vllm.compat.versions import TESTED_VERSIONS
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.pools import Model, Need, Pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Limits

Pools = Mapping[Arm, Pool]
Needs = Mapping[Workload, Mapping[Arm, Need]]
Column = TypeVar("Column")


@dataclass(frozen=True)
class Plan:
    """The pools and requests of one phase.

    Attributes:
        pools: of each arm that is planned.
        needs: what requests of each size take of them.
        warnings: of what was asked, for the user.
    """

    model: Model
    limits: Limits
    pools: Pools
    needs: Needs
    warnings: tuple[str, ...]


Plans = Mapping[Phase, Plan]
ARM_NAMES = {Arm.FULL: "full", Arm.STOCK: "stock", Arm.SWA: "here"}

_IN_PHASE = {
    Phase.BOTH: "",
    Phase.PREFILL: ", in the prompt only",
    Phase.DECODE: ", in generated tokens only",
}


def describe_plan(args: argparse.Namespace, model: Model, limits: Limits) -> str:
    """Describe the model and the engine in three lines."""
    sliding = [window for window in model.windows if window is not None]
    shown = " and ".join(map(str, sorted(set(sliding))))
    sinks = f", {model.sink_tokens} sink tokens" if model.sink_tokens else ""
    phase = _IN_PHASE[model.phase]
    page = model.layer_page_bytes(limits.block_size)
    most_layers = max(len(set(stage) - model.linear) for stage in model.stages)
    a_token = most_layers * page / limits.block_size / 1024
    memory = "" if args.kv_memory is None else f", {args.kv_memory} for the KV cache"
    num_devices = args.tensor_parallel_size * model.num_stages
    devices = f"; each of {num_devices} devices" if num_devices > 1 else ""
    layers = "all layers" if model.num_stages == 1 else f"the {most_layers} layers of a stage"
    if model.linear:
        layers = f"the {most_layers} layers that attend"
    if model.layer_partition is not None:
        layers += f" by {envs.LAYER_PARTITION}={model.layer_partition}"
    return (
        f"{args.model}: {len(model.windows)} layers, {len(sliding)} of them sliding (W={shown}"
        f"{sinks}{phase})\n"
        f"a token takes {a_token:g} KiB in {layers} ({model.kv_heads} KV heads of "
        f"{model.head_dim}, {model.number_bytes} bytes an element){devices}{memory}\n"
        f"pages of {limits.block_size} tokens, chunks of {limits.max_num_batched_tokens}, "
        f"{limits.num_steps_in_flight} step(s) in flight, at most {limits.max_num_seqs} requests "
        f"of {limits.max_model_len} tokens\n"
    )


def name_with_version(arm: Arm) -> str:
    """Name an arm in a header: how stock vLLM manages pages differs between its versions."""
    return f"{arm} {'/'.join(TESTED_VERSIONS)}" if arm is Arm.STOCK else str(arm)


def pool_rows(pools: Pools) -> list[list[object]]:
    """Make a row for each figure of a pool, with a column for each arm."""
    columns = []
    for pool in pools.values():
        size = max(group.most_layers(group.layers) for group in pool.groups)
        columns.append(
            {
                "KV groups x layers": f"{sum(g.num_groups for g in pool.groups)} x {size}",
                "padding layers": sum(group.num_padding for group in pool.groups),
                "KiB of a page": pool.page_bytes / 1024,
                "KiB that a token adds to a long text": pool.token_bytes / 1024,
                "pages promised to a longest request": pool.promised_pages,
                "pages in the pool": pool.num_pages,
                "vLLM's start-up estimate of requests": pool.estimate,
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return [row for row in rows if row[1] is not None]


def needs_by_phase(plans: Plans) -> dict[Workload, dict[Phase, Need]]:
    """Put what requests take with this plugin side by side, by phase."""
    (workloads, *_) = (plan.needs for plan in plans.values())
    return {w: {phase: p.needs[w][Arm.SWA] for phase, p in plans.items()} for w in workloads}


def plan_rows(
    needs: Mapping[Workload, Mapping[Column, Need]],
    names: Mapping[Column, str],
    *,
    with_pool: bool,
) -> tuple[list[str], list[list[object]]]:
    """Make the header, and a row for each prompt length; ``names`` are those of the columns."""
    first, *others = names.values()
    header = ["prompt"]
    for what in ("pages", "MiB", *(["at once"] if with_pool else [])):
        header += [f"{what}: {first}", *others]
    rows = []
    for workload, by_column in needs.items():
        row: list[object] = [workload.num_prompt]
        row += [need.peak_pages for need in by_column.values()]
        row += [f"{need.peak_bytes / 2**20:.1f}" for need in by_column.values()]
        if with_pool:
            row += [None if n.running is None else f"{n.running:.1f}" for n in by_column.values()]
        rows.append(row)
    return header, rows


# Parts of stock vLLM's figures: pages below the first are fewer, requests from the second on more.
_FEWER, _MORE = 0.9, 1.05


def plan_notes(plan: Plan, by_phase: Plans, refused: Mapping[Phase, str]) -> list[str]:
    """List what the tables leave unsaid.

    What stock vLLM refuses, what does not start, and why fewer pages may serve no more requests.
    """
    notes = []
    model = plan.model
    if model.linear:
        notes.append(
            f"{len(model.linear)} layers have linear attention: a state in the place of keys and "
            f"values, which has to fit into a page. That is why pages are {plan.limits.block_size} "
            "tokens long here, and a window much shorter than that gains no more; stock vLLM has "
            "no windows for this model, its column is what its page manager would do with them"
        )
    elif None in model.windows:
        notes.append(
            "stock vLLM's own Qwen3 refuses this mix of full and sliding layers, or serves it as "
            "full attention; its column is what its page manager would do with it, as it does with "
            "--model-impl transformers"
        )
    if model.sink_tokens:
        notes.append("stock vLLM has no sink tokens; its column is without them")
    if model.phase is Phase.PREFILL:
        notes.append(
            "with a window in the prompt only every page stays, because generated tokens see all "
            "of them: pages, admission and pool of this plugin are those of full attention. What "
            "you gain is time to first token, and answers that recall the whole prompt"
        )
        notes.append("stock vLLM has no phases; in its column answers have the window too")
    if model.phase is Phase.DECODE:
        notes.append(
            "with a window in generated tokens only a prompt's pages stay, because generated "
            "tokens see all of them: start-up of this plugin is full attention's, for a long text "
            "may be one long prompt. What you gain is pages while a request answers, the more the "
            "longer its answer: see --output"
        )
        notes.append("stock vLLM has no phases; in its column prompts have the window too")
    visible = min(window for window in model.windows if window is not None) + model.sink_tokens
    lengths = [w.num_prompt + w.num_output for w in plan.needs]
    if within := [length for length in lengths if length <= visible]:
        sinks = " and its sinks" if model.sink_tokens else ""
        which = "" if len(within) == len(lengths) else f" of up to {max(within)} tokens"
        notes.append(
            f"these requests{which}, prompt and answer together, fit into the window{sinks} "
            f"({visible} tokens), which frees nothing then; give a shorter --window, unless "
            "others are longer"
        )
    if any(_pages_mislead(need[Arm.STOCK], need[Arm.SWA]) for need in plan.needs.values()):
        notes.append(
            "pages are the most that a request holds, which is while its prompt is computed; how "
            "many run at once depends on what they hold on average, most of the time while they "
            "decode. So fewer pages need not mean more requests"
        )
    engines = {str(arm): pool for arm, pool in plan.pools.items()}
    for phase, other in by_phase.items():
        if other is not plan:
            engines[f"--phase {phase}"] = other.pools[Arm.SWA]
    for name, pool in engines.items():
        if pool.num_pages is not None and not pool.starts(plan.limits):
            remedy = (
                f"at most {pool.longest}" if pool.longest else "no length does: give more memory"
            )
            notes.append(
                f"{name} does not start with --max-model-len {plan.limits.max_model_len} ({remedy})"
            )
    for phase, reason in refused.items():
        notes.append(f"--phase {phase} is left out: {reason.partition(';')[0]}")
    return notes


def _pages_mislead(stock: Need, here: Need) -> bool:
    """Say whether a request holds fewer pages than with stock vLLM, and no more run at once."""
    return (
        stock.running is not None
        and here.running is not None
        and here.peak_pages < _FEWER * stock.peak_pages
        and here.running < _MORE * stock.running
    )


def plan_figures(
    args: argparse.Namespace, plan: Plan, by_phase: Plans, refused: Mapping[Phase, str]
) -> dict[str, Any]:
    """Collect the whole plan for JSON."""
    return {
        "model": args.model,
        **vars(plan.model),
        "linear": sorted(plan.model.linear),
        **vars(plan.limits),
        "pools": {arm.value: _pool_figures(pool, plan) for arm, pool in plan.pools.items()},
        "requests": [
            {
                **_request_sizes(workload),
                "arms": {arm.value: vars(need) for arm, need in by_arm.items()},
            }
            for workload, by_arm in plan.needs.items()
        ],
        "phases": {
            phase.value: {
                "pool": _pool_figures(other.pools[Arm.SWA], other),
                "requests": [
                    {**_request_sizes(workload), **vars(by_arm[Arm.SWA])}
                    for workload, by_arm in other.needs.items()
                ],
            }
            for phase, other in by_phase.items()
        },
        "refused_phases": {phase.value: reason for phase, reason in refused.items()},
    }


def _pool_figures(pool: Pool, plan: Plan) -> dict[str, Any]:
    starts = None if pool.num_pages is None else pool.starts(plan.limits)
    return {**pool.to_json(), "starts": starts}


def _request_sizes(workload: Workload) -> dict[str, int]:
    return {"prompt": workload.num_prompt, "output": workload.num_output}
