"""What answers for the page managers' counts: vLLM's ``/metrics``, and :func:`swa_vllm.stats`.

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
from vllm.config import VllmConfig

from swa_backend.metrics import METRICS, PageCounts
from swa_vllm.options import layer_plan
from swa_vllm.page_board import DIRECTORY, board_files, read_counts
from swa_vllm.registration import PLAIN, WINDOWED

_SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


class EngineCounts(Collector):
    """Metrics of the engines that this process started and that still run."""

    def __init__(self) -> None:
        # For this process's user alone; removed when the process ends.
        self._directory = tempfile.TemporaryDirectory(prefix="swa-metrics-")
        self.path = self._directory.name

    def describe(self) -> Iterator[Metric]:
        """The metrics without samples, as the registry wants to know their names."""
        named = {metric.name: metric for metric in METRICS.values()}
        for metric in named.values():
            yield Metric(metric.name, metric.help, metric.type)

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        yield from MultiProcessCollector.merge(board_files(self.path, is_wanted=_is_alive))


def serve_counts(vllm_config: VllmConfig) -> None:
    """Have the metrics of an engine that is about to be started, and whose model slides, served."""
    path = os.environ.get(_SHARED_DIRECTORY) or _collector().path
    os.environ[DIRECTORY] = path
    if vllm_config.parallel_config.data_parallel_backend == "ray":
        # Engines are actors then, which inherit only what vLLM copies.
        copied = os.environ.get(_RAY_COPIES, "").split(",")
        os.environ[_RAY_COPIES] = ",".join(sorted({*filter(None, copied), DIRECTORY}))


@cache
def _collector() -> EngineCounts:
    """The collector of this process."""
    collector = EngineCounts()
    REGISTRY.register(collector)
    return collector


def _has_managers(vllm_config: VllmConfig) -> bool:
    is_ours = vllm_config.model_config.architecture in {*PLAIN, *WINDOWED}
    keeps_groups = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return is_ours and keeps_groups and layer_plan(vllm_config).slides


def _is_alive(pid: int) -> bool:
    """Whether the process of an engine that this process started still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        # Engines run as the user of the process that started them: another user's process has
        # been given the number of an engine that is dead.
        return False
    return True


def engine_stats(llm: Any) -> dict[tuple[int, int], PageCounts]:
    """See :func:`swa_vllm.stats`."""
    config = getattr(llm, "llm_engine", llm).vllm_config
    directory = os.environ.get(DIRECTORY)
    counts = read_counts(board_files(directory, config.instance_id)) if directory else {}
    if not counts and _has_managers(config):
        raise RuntimeError(
            "the counts of this engine cannot be read here: it runs on another machine, or was "
            "started by another process; ask there"
        )
    return counts
