"""The counts of a page manager, kept where the process that serves ``/metrics`` can read them.

Managers live in the engine core, scrapes are answered elsewhere. prometheus_client has files for
that: each holds doubles that one process maps and writes, others read. A manager counts right in
them, so a step costs an addition for each count that changes, and a scrape is never behind.
"""

import mmap
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from glob import escape, glob
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.logger import init_logger

from swa_backend.metrics import ENGINE_SCRAPED, METRICS, OPTIONS_INFO, Metric, PageCounts
from swa_vllm.compat import envs

logger = init_logger(f"vllm.{__name__}")

# Parts of files' names: of several files with the same labels the newest is right ...
_GAUGE = "gauge_livemostrecent"
# ... or the greatest: an engine is scraped with one board, however many processes expect it.
_ENGINES = "gauge_livemax"
_FIELDS = tuple(field.name for field in fields(PageCounts))
_FIELD_OF = {(metric.sample, metric.kind): field for field, metric in METRICS.items()}


@dataclass(frozen=True)
class Owner:
    """The engine and KV group that a board counts for.

    Attributes:
        instance_id: vLLM's name of the engine; empty if nobody else may read its counts.
        engine: data parallel rank.
        group: KV group.
    """

    instance_id: str
    engine: int
    group: int

    @property
    def identifier(self) -> str:
        """Name of the board's files."""
        return _file_identifier(self.instance_id, self.engine, self.group)

    def key(self, metric: Metric) -> str:
        """prometheus_client's key of a metric with this owner's labels."""
        labels = {"engine": str(self.engine), "group": str(self.group)}
        if metric.kind is not None:
            labels["kind"] = metric.kind
        return mmap_key(metric.name, metric.sample, [*labels], [*labels.values()], metric.help)


class PageBoard:
    """Counts of one manager, by the names of the fields of :class:`PageCounts`."""

    def __init__(self, owner: Owner) -> None:
        """Start at zero: in files of ``$SWA_METRICS_DIR``, or in memory where that is no place."""
        own = memoryview(bytearray(8 * len(_FIELDS))).cast("d")
        self._cells = {field: (own, index) for index, field in enumerate(_FIELDS)}
        directory = envs.read_variable(envs.METRICS_DIR)
        if not owner.instance_id or directory is None:
            return
        if not os.path.isdir(directory):  # as on another node
            logger.info_once(
                "SWA metrics of engine %d are not served: %s, where its server reads them, is not "
                "on this machine.",
                owner.engine,
                directory,
                scope="process",
            )
            return
        for prefix in ("counter", _GAUGE):
            path = Path(directory, f"{prefix}_{owner.identifier}.db")
            of_type = {f: m for f, m in METRICS.items() if m.type == prefix.partition("_")[0]}
            self._cells |= _make_board_file(path, {f: owner.key(m) for f, m in of_type.items()})
        path = Path(directory, f"{_ENGINES}_{owner.identifier}.db")
        _make_board_file(path, {"scraped": _key_of_engine(owner.engine)}, 1.0)

    def add(self, field: str, amount: int) -> None:
        """Count ``amount`` more, or fewer."""
        values, index = self._cells[field]
        values[index] += amount

    def raise_to(self, field: str, amount: int) -> None:
        """Keep the greatest amount seen."""
        values, index = self._cells[field]
        if values[index] < amount:
            values[index] = amount

    def snapshot(self) -> PageCounts:
        """All counts now."""
        return PageCounts(**{f: int(values[i]) for f, (values, i) in self._cells.items()})


def expect_engines(directory: str, instance_id: str, engines: Iterable[int]) -> None:
    """Have scrapes say of engines that they lack their counts, until a board of theirs is there.

    Args:
        directory: where the server of the engines reads.
        instance_id: vLLM's name of the server in this process.
        engines: data parallel ranks.
    """
    path = Path(directory, f"{_ENGINES}_{_file_identifier(instance_id)}.db")
    _make_board_file(path, {str(engine): _key_of_engine(engine) for engine in engines})


def serve_options(
    directory: str, instance_id: str, engines: Iterable[int], options: Mapping[str, str]
) -> None:
    """Have scrapes say the options of engines.

    Args:
        directory: where the server of the engines reads.
        instance_id: vLLM's name of the server in this process.
        engines: data parallel ranks.
        options: labels of the metric.
    """
    path = Path(directory, f"{_ENGINES}_{_file_identifier(instance_id, 'options')}.db")
    _make_board_file(path, {str(e): _key_of_options(e, options) for e in engines}, 1.0)


def _key_of_options(engine: int, options: Mapping[str, str]) -> str:
    labels = {"engine": str(engine), **options}
    name, sample, text = OPTIONS_INFO.name, OPTIONS_INFO.sample, OPTIONS_INFO.help
    return str(mmap_key(name, sample, [*labels], [*labels.values()], text))


def _file_identifier(instance_id: str, *parts: int | str) -> str:
    """Name files of this process; prometheus_client takes an underscore for a separator."""
    instance = instance_id.replace("_", "-")
    return "-".join(["swa", instance, *map(str, parts), str(os.getpid())])


def _key_of_engine(engine: int) -> str:
    name, help_text = ENGINE_SCRAPED.name, ENGINE_SCRAPED.help
    return str(mmap_key(name, ENGINE_SCRAPED.sample, ["engine"], [str(engine)], help_text))


def _make_board_file(
    path: Path, keys: dict[str, str], value: float = 0.0
) -> "dict[str, tuple[memoryview[float], int]]":
    """Make prometheus_client's file with a value for all fields; returns where each field's lies.

    It appears at ``path`` once it is whole, readable by its owner alone.
    """
    new = path.with_suffix(".new")
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    values = MmapedDict(str(new))
    now = time.time()
    for key in keys.values():
        values.write_value(key, value, now)
    values.close()
    position = {key: pos for key, _, _, pos in MmapedDict.read_all_values_from_file(str(new))}
    with new.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
    new.rename(path)
    return {field: (view, position[key] // view.itemsize) for field, key in keys.items()}


def board_files(
    directory: Path | str, instance_id: str = "", is_wanted: Callable[[int], bool] | None = None
) -> list[str]:
    """Files of all engines in ``directory``, or of one; ``is_wanted`` is asked by process id."""
    pattern = f"*_swa-{instance_id.replace('_', '-')}{'-' if instance_id else ''}*.db"
    found = sorted(glob(os.path.join(escape(str(directory)), pattern)))
    if is_wanted is None:
        return found
    return [file for file in found if is_wanted(int(Path(file).stem.rpartition("-")[2]))]


def read_counts(files: Iterable[str]) -> dict[tuple[int, int], PageCounts]:
    """Counts by engine and KV group."""
    counts = defaultdict[tuple[int, int], dict[str, int]](dict)
    for metric in MultiProcessCollector.merge(files):
        if metric.name in (ENGINE_SCRAPED.name, OPTIONS_INFO.name):
            continue
        for sample in metric.samples:
            labels = sample.labels
            owner = int(labels["engine"]), int(labels["group"])
            field = _FIELD_OF[sample.name, labels.get("kind")]
            counts[owner][field] = int(sample.value)
    return {owner: PageCounts(**counts[owner]) for owner in sorted(counts)}
