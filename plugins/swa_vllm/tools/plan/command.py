"""KV cache of a model, planned from its config.json: pages, bytes, requests that run at once.

Full attention, stock vLLM's sliding window and this plugin side by side, and this plugin in each
phase, without weights, GPU or vLLM. "Estimate" is the "maximum concurrency" of vLLM's start-up
line, which assumes requests of --max-model-len; "at once" is what runs while more requests wait,
all of one size and none with a prefix in the cache. Pages that prefix caching keeps beyond these
while memory is plentiful are not counted, and speculative decoding is not planned.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swa_backend.can_slide import check_can_slide
from swa_backend.checkpoint import Checkpoint, read_checkpoint
from swa_backend.layers import resolve_layers
from swa_backend.options import PrefillPages, SWAConfigError, SWAOptions
from swa_backend.pages import max_partial_tokens
from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.compat import envs
from swa_vllm.compat.architectures import check_architectures, phase_refused
from swa_vllm.compat.cache_dtypes import UNQUANTIZED, sinks_refused_on_cpus
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    add_additional_config_argument,
    add_window_arguments,
    additional_config_of_arguments,
    check_number_argument,
    check_number_arguments,
    options_as_flags,
    parse_memory,
)
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.engine_arguments import add_engine_arguments
from swa_vllm.tools.common.hub import find_model
from swa_vllm.tools.common.pools import Model, need_in_pool, plan_pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import (
    DTYPE_BYTES,
    Device,
    Limits,
    bytes_of_a_weight,
    bytes_of_an_element,
    kv_heads_of_a_device,
    longest_text_in_limits,
    page_size_with_states,
    size_cache_dtype,
)
from swa_vllm.tools.plan.pictures import plot_plan
from swa_vllm.tools.plan.report import (
    ARM_NAMES,
    Plan,
    describe_plan,
    name_with_version,
    needs_by_phase,
    plan_figures,
    plan_notes,
    plan_rows,
    pool_rows,
)

EXAMPLE = (
    "Qwen3-8B/config.json --window 4096 --sink-tokens 4 --full-attention-layers every:4 "
    "--kv-memory 16GiB"
)
_STATE_DTYPES = ("auto", "float32", "float16", "bfloat16")
_PROMPTS = (2000, 8000, 32000, 128000)
_NUMBERS = (
    "block_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "output",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa plan``; those of vLLM have its names."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a directory, a config.json, or a hub's name whose config.json is cached",
    )
    add_window_arguments(parser)
    add_additional_config_argument(parser)
    add_engine_arguments(
        parser,
        block_size="16, on CPUs 128",
        dtype="auto",
        kv_cache_dtype="auto",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len="what the model was made for",
        kv_memory="no pool is planned",
    )
    parser.add_argument(
        "--mamba-ssm-cache-dtype",
        choices=_STATE_DTYPES,
        default="auto",
        help="dtype of states of linear attention; auto is float32 on CPUs (AVX-512 BF16)",
    )
    parser.add_argument(
        "--device",
        choices=tuple(Device),
        default=Device.GPU,
        help="what serves; on a GPU two steps are in flight",
    )
    parser.add_argument(
        "--prompt",
        metavar="TOKENS,...",
        help=f"lengths of prompts (default: {','.join(map(str, _PROMPTS))})",
    )
    parser.add_argument(
        "--output", type=int, default=512, metavar="TOKENS", help="tokens of each answer"
    )
    plots.add_plot_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the pools and the requests in them; returns the figures.

    Raises:
        ValueError: what is planned cannot be served; options are named as this command has them.
    """
    try:
        return _run_plan(args)
    except SWAConfigError as error:
        raise ValueError(options_as_flags(str(error))) from error


def _run_plan(args: argparse.Namespace) -> dict[str, Any]:
    plots.check_plot_path(args.plot)
    checkpoint = read_checkpoint(find_model(args.model))
    check_architectures(checkpoint.architectures)
    section = _section_of_options(args)
    plan = _plan_phase(args, checkpoint, section, tuple(Arm))
    by_phase, refused = _plan_phases(args, checkpoint, section, plan)
    with_pool = args.kv_memory is not None
    print(describe_plan(args, plan.model, plan.limits))
    print(format_table(("", *map(name_with_version, Arm)), pool_rows(plan.pools)))
    print(f"\none request, and how many run at once; answers of {args.output} tokens")
    print(format_table(*plan_rows(plan.needs, ARM_NAMES, with_pool=with_pool)))
    if len(by_phase) > 1:
        print("\nthe same with this plugin by --phase; * is what was planned above")
        names = {phase: f"{phase}{'*' * (phase is plan.model.phase)}" for phase in by_phase}
        print(format_table(*plan_rows(needs_by_phase(by_phase), names, with_pool=with_pool)))
    for note in (*map(options_as_flags, plan.warnings), *plan_notes(plan, by_phase, refused)):
        print(f"note: {note}")
    if args.plot is not None:
        plot_plan(args.plot, Path(args.model).name, plan.needs)
    return plan_figures(args, plan, by_phase, refused)


def _section_of_options(args: argparse.Namespace) -> dict[str, Any]:
    """Take the options of windows from the flags and ``--additional-config``.

    Raises:
        ValueError: one of them is wrong, given in both, or not planned.
    """
    section: dict[str, Any] = additional_config_of_arguments(args).get("swa", {})
    if section.get("prefill_pages") == PrefillPages.ALL:
        raise ValueError(
            'a plan is of the default swa.prefill_pages="auto", and --additional-config has "all", '
            "with which requests hold more; leave it out"
        )
    return section


def _plan_phases(
    args: argparse.Namespace, checkpoint: Checkpoint, section: dict[str, Any], asked: Plan
) -> tuple[dict[Phase, Plan], dict[Phase, str]]:
    """Plan every phase for this plugin; returns the plans, and why others are refused."""
    plans, refused = {}, {}
    for phase in Phase:
        try:
            plans[phase] = (
                asked
                if phase is asked.model.phase
                else _plan_phase(
                    args,
                    checkpoint,
                    {**section, "phase": phase.value},
                    (Arm.SWA,),
                )
            )
        except ValueError as error:
            refused[phase] = options_as_flags(str(error))
    return plans, refused


def _plan_phase(
    args: argparse.Namespace, checkpoint: Checkpoint, section: dict[str, Any], arms: Sequence[Arm]
) -> Plan:
    """Plan the phase that the options in ``section`` ask for.

    Raises:
        ValueError: it cannot be served.
    """
    options = SWAOptions.from_dict(section)
    limits = _planned_limits(args, checkpoint, options)
    layers = resolve_layers(checkpoint.config, options, max_model_len=limits.max_model_len)
    if not layers.slides:
        raise ValueError(
            "no layer of this model has a window, so there is nothing to compare: give --window"
        )
    check_can_slide(checkpoint.config)
    if options.phase is not Phase.BOTH:
        refusal = phase_refused(f"--phase {options.phase}", checkpoint.architectures)
        if refusal is not None:
            raise ValueError(refusal)
    _check_cache_of_copies(args, checkpoint, options)
    _refuse_stages_on_cpus(args)
    if layers.linear:
        _refuse_stages_beside_states(args)
    model = Model(
        windows=layers.windows,
        sink_tokens=options.sink_tokens,
        kv_heads=kv_heads_of_a_device(checkpoint, args.tensor_parallel_size),
        head_dim=checkpoint.head_dim,
        number_bytes=bytes_of_an_element(checkpoint, args.dtype, args.kv_cache_dtype),
        phase=options.phase,
        num_stages=args.pipeline_parallel_size,
        layer_partition=envs.read_variable(envs.LAYER_PARTITION),
        linear=layers.linear,
    )
    memory = None if args.kv_memory is None else parse_memory(args.kv_memory)
    pools = {arm: plan_pool(arm, model, limits, memory) for arm in arms}
    if memory is not None and not all(pool.num_pages for pool in pools.values()):
        raise ValueError(f"--kv-memory {args.kv_memory} does not hold a single page; give more")
    workloads = [Workload(prompt, args.output) for prompt in _prompts_to_plan(args, limits)]
    needs = {
        w: {arm: need_in_pool(arm, model, pools[arm], limits, w) for arm in arms} for w in workloads
    }
    return Plan(model, limits, pools, needs, layers.warnings)


def _check_cache_of_copies(
    args: argparse.Namespace, checkpoint: Checkpoint, options: SWAOptions
) -> None:
    """Refuse what engines refuse on CPUs, where sinks and ends of prompts are copied."""
    asked = size_cache_dtype(checkpoint.quantization)
    by_checkpoint = args.kv_cache_dtype == "auto"
    dtype = asked if by_checkpoint else args.kv_cache_dtype
    copies = "--sink-tokens" if options.sink_tokens else None
    if copies is None and options.phase is Phase.DECODE:
        copies = f"--phase {options.phase}"
    if args.device == Device.CPU and copies is not None and dtype not in UNQUANTIZED:
        named = f"--kv-cache-dtype {dtype}{' (the checkpoint asks for it)' * by_checkpoint}"
        other = f"--kv-cache-dtype {'auto' if asked == 'auto' else 'bfloat16'}"
        raise ValueError(sinks_refused_on_cpus(named, copies, other))


def _refuse_stages_on_cpus(args: argparse.Namespace) -> None:
    if args.pipeline_parallel_size > 1 and args.device == Device.CPU:
        raise ValueError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size} fails in vLLM's CPU build; "
            "leave it out, or plan for --device gpu"
        )


def _refuse_stages_beside_states(args: argparse.Namespace) -> None:
    if args.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size} was not tested with windows "
            "in a model that has layers with linear attention; leave it out"
        )


def _page_size(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """Compute the tokens of a page: more than ``--block-size`` where a state has to fit in."""
    state, dtype = checkpoint.linear, args.mamba_ssm_cache_dtype
    if state is None:
        return int(args.block_size)
    if dtype == "auto":
        dtype = "float32" if args.device == Device.CPU else state.dtype or args.dtype
    model_bytes = bytes_of_a_weight(checkpoint, args.dtype)
    heads = kv_heads_of_a_device(checkpoint, args.tensor_parallel_size)
    number_bytes = bytes_of_an_element(checkpoint, args.dtype, args.kv_cache_dtype)
    return page_size_with_states(
        state,
        args.block_size,
        heads * 2 * checkpoint.head_dim * number_bytes,
        tensor_parallel_size=args.tensor_parallel_size,
        model_bytes=model_bytes,
        state_bytes=model_bytes if dtype == "auto" else DTYPE_BYTES[dtype],
    )


def _planned_limits(
    args: argparse.Namespace, checkpoint: Checkpoint, options: SWAOptions
) -> Limits:
    device = Device(args.device)
    if args.block_size is None:
        args.block_size = device.block_size
    max_model_len = (
        longest_text_in_limits(checkpoint) if args.max_model_len is None else args.max_model_len
    )
    check_number_arguments(args, _NUMBERS)
    check_number_argument("max_model_len", max_model_len)
    if args.max_num_batched_tokens < args.max_num_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {args.max_num_batched_tokens} is below --max-num-seqs "
            f"{args.max_num_seqs}, which vLLM refuses; raise the one or lower the other"
        )
    block_size = _page_size(args, checkpoint)
    # Copies on CPUs lie there; with every page kept there are none.
    spare_tokens = {
        Phase.BOTH: options.sink_tokens,
        Phase.PREFILL: 0,
        Phase.DECODE: max_partial_tokens(block_size),
    }[options.phase]
    return Limits(
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        num_steps_in_flight=device.num_steps_in_flight(args.pipeline_parallel_size),
        spare_tokens=spare_tokens if device is Device.CPU else 0,
    )


def _prompts_to_plan(args: argparse.Namespace, limits: Limits) -> list[int]:
    longest = limits.max_model_len - args.output
    if longest < 1:
        raise ValueError(
            f"answers of --output {args.output} tokens leave no room for a prompt: "
            f"{_whose_length(args, limits)}; lower the one or raise the other"
        )
    if args.prompt is None:
        return [n for n in _PROMPTS if n <= longest] or [longest]
    try:
        prompts = [int(part) for part in args.prompt.split(",")]
    except ValueError:
        raise ValueError(
            f"--prompt {args.prompt!r}: write numbers of tokens with commas between them"
        ) from None
    for prompt in prompts:
        if not 1 <= prompt <= longest:
            raise ValueError(
                f"--prompt {prompt} must be at least 1 and, with answers of {args.output} tokens, "
                f"at most {longest}: {_whose_length(args, limits)}"
            )
    return prompts


def _whose_length(args: argparse.Namespace, limits: Limits) -> str:
    """Say how long a request may be, and whether a flag or the model says so."""
    if args.max_model_len is None:
        return f"the model's own length is {limits.max_model_len}, without --max-model-len"
    return f"--max-model-len is {limits.max_model_len}"
