"""Where the page managers' counts are read: vLLM's ``/metrics``, and :func:`swa_vllm.stats`.

One API server serves prometheus_client's default registry, where a collector of ours reads the
engines' files. Several serve what lies in ``PROMETHEUS_MULTIPROC_DIR``, each the same: there the
engines write into that directory.
"""

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from vllm.config import ParallelConfig, VllmConfig

import swa_backend
from swa_backend.layers import FULL, SLIDING
from swa_backend.metrics import (
    ENGINE_SCRAPED,
    METRICS,
    OPTION_LABELS,
    OPTIONS_INFO,
    PageCounts,
)
from swa_vllm.compat import envs
from swa_vllm.compat.architectures import PLAIN, WINDOWED
from swa_vllm.config.swa_config import SWAConfig, vllm_config_frees_pages
from swa_vllm.metrics.board import board_files, expect_engines, read_counts, serve_options


class EngineCounts(Collector):
    """Metrics of the engines that this process started and that still run on this machine."""

    def __init__(self) -> None:
        # For this process's user alone; removed when the process ends.
        self._directory = tempfile.TemporaryDirectory(prefix="swa-metrics-")
        self.path = self._directory.name

    def describe(self) -> Iterator[Metric]:
        """The metrics without samples, as the registry wants to know their names."""
        named = {
            metric.name: metric for metric in (*METRICS.values(), ENGINE_SCRAPED, OPTIONS_INFO)
        }
        for metric in named.values():
            yield Metric(metric.name, metric.help, metric.type)

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        yield from MultiProcessCollector.merge(board_files(self.path, is_wanted=_is_engine_alive))


def serve_counts(vllm_config: VllmConfig, swa: SWAConfig) -> None:
    """Have the metrics served of an engine that is about to start and whose model slides."""
    directory = envs.read_variable(envs.SHARED_METRICS_DIR) or _counts_collector().path
    envs.set_metrics_dir(directory)
    parallel = vllm_config.parallel_config
    if _keeps_groups(vllm_config) and os.path.isdir(directory):
        engines = _engines_of_server(parallel)
        expect_engines(directory, vllm_config.instance_id, engines)
        if swa.slides:
            serve_options(directory, vllm_config.instance_id, engines, _labels_of_options(swa))
    if parallel.data_parallel_backend == "ray":  # engines are actors then
        envs.copy_variable_to_ray(envs.METRICS_DIR)


def _labels_of_options(swa: SWAConfig) -> dict[str, str]:
    windows = sorted({window for window in swa.layers.windows if window is not None})
    types = swa.layers.layer_types
    values = (
        swa_backend.__version__,
        ",".join(map(str, windows)),
        swa.options.sink_tokens,
        swa.options.phase.value,
        types.count(SLIDING),
        types.count(FULL),
    )
    return dict(zip(OPTION_LABELS, map(str, values), strict=True))


def _engines_of_server(parallel: ParallelConfig) -> range:
    """Data parallel ranks of the engines that this process's server sends requests to."""
    first = parallel.data_parallel_rank
    if parallel.data_parallel_rank_local is not None:  # offline, an engine in each process
        return range(first, first + 1)
    if parallel.local_engines_only:  # other servers have the others
        return range(first, first + parallel.data_parallel_size_local)
    return range(parallel.data_parallel_size)


@cache
def _counts_collector() -> EngineCounts:
    """The collector of this process."""
    collector = EngineCounts()
    REGISTRY.register(collector)
    return collector


def _has_page_managers(vllm_config: VllmConfig) -> bool:
    is_ours = vllm_config.model_config.architecture in {*PLAIN, *WINDOWED}
    return is_ours and _keeps_groups(vllm_config) and vllm_config_frees_pages(vllm_config)


def _keeps_groups(vllm_config: VllmConfig) -> bool:
    return not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager


def _is_engine_alive(pid: int) -> bool:
    """Whether the process of an engine that this process started still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        # Engines run as the user of the process that started them: another user's process has
        # been given the number of an engine that is dead.
        return False
    return True


def engine_stats(llm: Any) -> dict[tuple[int, int], PageCounts]:
    """Read what :func:`swa_vllm.stats` returns."""
    config = getattr(llm, "llm_engine", llm).vllm_config
    directory = envs.read_variable(envs.METRICS_DIR)
    counts = read_counts(board_files(directory, config.instance_id)) if directory else {}
    if not counts and _has_page_managers(config):
        raise RuntimeError(
            "the counts of this engine cannot be read here: it runs on another machine, or was "
            "started by another process; ask there"
        )
    return counts
