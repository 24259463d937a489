"""The table of effective windows, logged once at start-up."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.attention.layer import WindowedAttention
from swa_vllm.compat.architectures import DRAFT_PREFIX
from swa_vllm.compat.group_numbers import number_kv_groups
from swa_vllm.config.swa_config import vllm_text_config

logger = init_logger(f"vllm.{__name__}")

# Layers by their numbers, each with its row of the table.
Described = list[tuple[int, tuple[str, ...]]]

_SLIDING = {
    Phase.BOTH: "sliding",
    Phase.PREFILL: "sliding in prompts",
    Phase.DECODE: "sliding in answers",
}
_UNKNOWN = "chosen by vLLM"
_HEADER = ("layers", "kind", "window", "sinks", "backend", "KV spec", "KV group")


def log_layers(vllm_config: VllmConfig, group: Sequence[str] = ()) -> None:
    """Note that the windowed layers named by ``group`` have a KV group, and log the table.

    The table waits for the call that gives the last windowed layer of this worker its group; a
    call without ``group`` logs what is known. With pipeline stages only that is logged, by the
    first stage for all, and all have to call: a stage may have no windowed layer, and so no group.
    """
    has_stages = vllm_config.parallel_config.pipeline_parallel_size > 1
    if has_stages and group:
        return
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    windowed = [layer for layer in layers.values() if isinstance(layer, WindowedAttention)]
    was_open = _table_waits_for_groups(windowed)
    for layer in windowed:
        layer.has_kv_group |= layer.layer_name in group
    complete = was_open and not _table_waits_for_groups(windowed)
    if not complete and group:
        return
    is_first = get_tensor_model_parallel_rank() == 0
    if not is_first and not has_stages:
        return
    numbers = number_kv_groups(vllm_config, get_kv_cache_spec(vllm_config)) if complete else {}
    described = _described_layers(vllm_config, layers, numbers)
    if has_stages:
        described = _gather_stages(described)
        is_first = is_first and get_pp_group().is_first_rank
    if is_first:
        lines = lines_of_layers(_HEADER, _join_groups(described))
        logger.info("\n".join(f"SWA {line}" for line in lines))


def _table_waits_for_groups(windowed: Sequence[WindowedAttention]) -> bool:
    return not all(layer.has_kv_group for layer in windowed)


def _described_layers(
    vllm_config: VllmConfig, layers: dict[str, Attention], groups: Mapping[str, int]
) -> Described:
    """This worker's layers by their numbers, each with its row of the table; drafts' come last."""
    ordered = sorted(
        layers.items(),
        key=lambda item: (_is_drafts(item[0], vllm_config), extract_layer_index(item[0])),
    )
    return [
        (
            extract_layer_index(name),
            (*_describe_layer(vllm_config, layer), _shown(groups.get(name))),
        )
        for name, layer in ordered
    ]


def _shown(group: int | None) -> str:
    return _UNKNOWN if group is None else str(group)


def _join_groups(described: Described) -> Described:
    """Give layers that are otherwise described alike the KV groups of all of them, as ``1-3``."""
    numbers = defaultdict[tuple[str, ...], set[int]](set)
    for _, (*row, group) in described:
        if group != _UNKNOWN:
            numbers[tuple(row)].add(int(group))
    return [
        (index, (*row, _shown_layers(sorted(numbers[tuple(row)])) or _UNKNOWN))
        for index, (*row, _) in described
    ]


def _is_drafts(name: str, vllm_config: VllmConfig) -> bool:
    """Whether a layer drafts: those of a draft model have a prefix, others count on."""
    num_layers = vllm_text_config(vllm_config).num_hidden_layers
    return name.startswith(DRAFT_PREFIX) or bool(extract_layer_index(name) >= num_layers)


def _gather_stages(described: Described) -> Described:
    """Give every pipeline stage the rows of all."""
    stages = get_pp_group()
    found: list[Any] = [None] * stages.world_size
    torch.distributed.all_gather_object(found, described, group=stages.cpu_group)
    return [row for stage in found for row in stage]


def lines_of_layers(
    header: tuple[str, ...], described: Iterable[tuple[int, tuple[str, ...]]]
) -> list[str]:
    """A line for each kind of layer: those that are described alike, wherever they lie."""
    alike = defaultdict[tuple[str, ...], list[int]](list)
    for index, description in described:
        alike[description].append(index)
    rows = [(_shown_layers(indices), *description) for description, indices in alike.items()]
    return format_table(header, rows, num_left=len(header)).splitlines()


def _shown_layers(indices: Sequence[int]) -> str:
    """Name layers in runs of neighbours, and many that alternate by the first two and the last.

    Such as ``0-3, 27`` or ``3, 7, ... 35``.
    """
    # In a run an index and its place differ by the same number.
    runs = [
        [index for _, index in run]
        for _, run in groupby(enumerate(indices), key=lambda item: item[1] - item[0])
    ]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(spans) > 3 and _runs_alternate(runs):
        return f"{spans[0]}, {spans[1]}, ... {spans[-1]}"
    return ", ".join(spans)


def _runs_alternate(runs: Sequence[Sequence[int]]) -> bool:
    """Whether runs begin in one step and are of one length, the last one cut off perhaps."""
    steps = {later[0] - earlier[0] for earlier, later in pairwise(runs)}
    lengths = {len(run) for run in runs[:-1]}
    return len(steps) == len(lengths) == 1 and len(runs[-1]) <= max(lengths)


def kind_of_layer(window: int | None, phase: Phase) -> str:
    """Say what a layer with this window is called, of whose tokens ``phase`` has it."""
    if window is None:
        return "full"
    return _SLIDING[phase]


def _describe_layer(vllm_config: VllmConfig, layer: Attention) -> tuple[str, ...]:
    phase, sinks = Phase.BOTH, "-"
    if isinstance(layer, WindowedAttention):
        phase, shifted = layer.swa.options.phase, layer.swa.options.position_shift
        sinks = f"{layer.sink_tokens}{' shifted' if shifted else ''}"
    kind = kind_of_layer(layer.sliding_window, phase)
    if _is_drafts(layer.layer_name, vllm_config):
        kind += " (draft)"
    window = "-" if layer.sliding_window is None else str(layer.sliding_window)
    spec = type(layer.get_kv_cache_spec(vllm_config)).__name__
    return kind, window, sinks, layer.attn_backend.get_name(), spec
