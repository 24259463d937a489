"""Fixtures: demo and tiny checkpoints, and in-process engines.

Engines run eager, in fp32 and in this process, so that their tokens are comparable with Hugging
Face's and their managers can be looked at. One engine lives at a time; it is reused by the tests
that follow one another with the same configuration.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

# Read by OpenMP (with torch), vLLM and Triton (which vLLM imports) when they are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from vllm import LLM, ModelRegistry, envs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import swa_vllm
from make_demo_model import ensure_demo_model
from swa_vllm.attention.poison import PoisonedPages
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    num_held_pages,
    start_engine,
    stop_engine,
)
from tests.helpers.processes import Probe, probe_environment
from tests.helpers.quantized_models import save_quantized
from tests.helpers.runners import RUNNER, turns
from tests.helpers.tiny_models import save_tiny_llama, save_tiny_model

# How fast a machine makes examples decides nothing.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
SUMMARY = "summary: "  # begins names that tests give to record_property, with numbers to add up


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag by which the test command shares the suite among its environments."""
    parser.addoption(
        "--share",
        metavar="FILE",
        help="run the tests whose turn it is on this vLLM and model runner; add a line of JSON "
        "to FILE that says what ran",
    )
    parser.addoption(
        "--resume",
        metavar="FILE",
        help="run no test that FILE says has passed on this vLLM and model runner; add to FILE "
        "each that passes",
    )


def pytest_report_header() -> str:
    """Say what runs the engines."""
    return f"vLLM and model runner: {RUNNER}"


@pytest.hookimpl(trylast=True)  # after -m and -k: what they leave takes turns
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what another environment runs, and what has passed before."""
    here = items
    if config.getoption("--share"):
        here = [item for item, runners in turns(items) if RUNNER in runners]
    for item in here:
        only_on = item.get_closest_marker("only_on")
        if only_on is not None and RUNNER not in only_on.args:
            item.add_marker(pytest.mark.skip(reason=f"is for {', '.join(only_on.args)} only"))
    if resumed := config.getoption("--resume"):
        passed = set(Path(resumed).read_text().splitlines()) if Path(resumed).exists() else set()
        here = [item for item in here if f"{RUNNER} {item.nodeid}" not in passed]
    kept = set(here)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = _longest_files_first(here) if config.getoption("--share") else here


def _longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Order tests as processes shall take their files: no core idles at the end for a long one."""
    num_tests = Counter(item.path for item in items)
    return sorted(
        items, key=lambda item: (not item.get_closest_marker("long"), -num_tests[item.path])
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down at once what passed, for a run that takes up where this one is cut off."""
    report = yield
    resumed = item.config.getoption("--resume")
    if resumed and report.when == "call" and report.passed:
        with Path(resumed).open("a") as lines:
            lines.write(f"{RUNNER} {item.nodeid}\n")
    return report


@pytest.fixture(scope="session")
def demo_model() -> dict[str, Path]:
    """Real weights: directories of the variants ``full``, ``sliding`` and ``mixed``."""
    directory = Path(os.environ.get("SWA_DEMO_CACHE", ".cache/demo"))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):  # tests may run in several processes
        return ensure_demo_model(directory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Directory of the random tiny Qwen3 with the given config keys; same weights for all."""
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp("tiny"), **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random tiny Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def quantized_model(
    tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> ModelFactory:
    """Directory of the tiny Qwen3 with the given config keys, quantized as ``kind``."""
    root = tmp_path_factory.mktemp("quantized")

    @cache
    def make(kind: str, plain: Path) -> Path:
        return save_quantized(root / f"{kind}_{plain.name}", plain, kind)

    return lambda kind, **overrides: make(kind, tiny_model(**overrides))


@pytest.fixture(scope="session")
def describe_stock(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., dict[str, Any]]]:
    """What ``describe`` says of vLLM without the plugin, for a checkpoint and ``LLM`` arguments.

    That vLLM runs in another process. An engine that cannot start has an ``error`` only.
    """
    log = tmp_path_factory.mktemp("stock") / "log"
    probe = Probe("stock", {**probe_environment(), "VLLM_PLUGINS": ""}, log)
    said: dict[str, dict[str, Any]] = {}

    def describe(model: Path, **kwargs: Any) -> dict[str, Any]:
        key = repr((model, sorted(kwargs.items())))
        if key not in said:
            said[key] = probe.ask(str(model), kwargs)
        return said[key]

    yield describe
    probe.stop()


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineFactory]:
    """The engine of a checkpoint and ``LLM`` arguments; it replaces the one before."""
    alive: dict[str, LLM] = {}

    def start(model: Path, **kwargs: Any) -> LLM:
        key = repr((model, sorted(kwargs.items())))
        if key not in alive:
            alive.clear()
            stop_engine()
            alive[key] = start_engine(model, **kwargs)
        return alive[key]

    def stop() -> None:
        alive.clear()
        stop_engine()

    start.alive, start.stop = alive, stop  # type: ignore[attr-defined]
    yield start
    stop()


@pytest.fixture(autouse=True)
def _nothing_leaks(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> Iterator[None]:
    """The engine of a test holds no page at its end; free pages that were poisoned are counted."""
    if "engine" not in request.fixturenames:
        yield
        return
    num_poisoned, poison = 0, PoisonedPages.poison_free_pages

    def counted(self: PoisonedPages, kv_caches: list[torch.Tensor]) -> None:
        nonlocal num_poisoned
        before = self._poisoned
        poison(self, kv_caches)
        num_poisoned += len(self._poisoned - before)

    monkeypatch.setattr(PoisonedPages, "poison_free_pages", counted)
    yield
    engines = request.getfixturevalue("engine").alive.values()
    num_leaked = sum(map(num_held_pages, engines))
    record_property("summary: pages poisoned", num_poisoned)
    record_property("summary: pages leaked", num_leaked)
    assert num_leaked == 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sums of what tests recorded as ``summary: <name>``, of all processes."""
    share = terminalreporter.config.getoption("--share")
    if share and "PYTEST_XDIST_WORKER" not in os.environ:  # their reports come to the first process
        _write_what_ran(terminalreporter.stats, Path(share))
    sums = Counter[str]()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "teardown":  # which has all that its test recorded
            for name, value in report.user_properties:
                if name.startswith(SUMMARY):
                    sums[name.removeprefix(SUMMARY)] += value
    if sums:
        terminalreporter.section("what was tried")
        for name in sorted(sums):
            terminalreporter.write_line(f"{name}: {sums[name]:,}")


def _write_what_ran(stats: dict[str, list[Any]], file: Path) -> None:
    files = defaultdict[str, Counter[str]](Counter)
    seconds = Counter[str]()
    for outcome in ("passed", "failed", "error", "skipped", ""):  # "": set-up and tear-down
        for report in stats.get(outcome, ()):
            path = report.nodeid.partition("::")[0]
            seconds[path] += report.duration
            if outcome:
                files[path][outcome] += 1
    with file.open("a") as lines:
        lines.write(json.dumps({"runner": RUNNER, "files": files, "seconds": seconds}) + "\n")


@pytest.fixture(scope="session")
def no_engine(engine: EngineFactory) -> Callable[[], None]:
    """Stops the engine that :func:`engine` has alive, for code that starts its own."""
    return engine.stop  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def vllm_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """For variables that vLLM reads, which it keeps once an engine has started in this process."""
    envs.disable_envs_cache()
    return monkeypatch


@pytest.fixture
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whatever the test registers with vLLM is undone.

    vLLM remembers which class it resolved for a checkpoint: give each such test one of its own.
    """
    swa_vllm.register()
    models = dict(ModelRegistry.models)
    hooks = dict(MODELS_CONFIG_MAP)
    custom = AttentionBackendEnum.CUSTOM.get_path()
    yield monkeypatch
    MODELS_CONFIG_MAP.clear()
    MODELS_CONFIG_MAP.update(hooks)
    ModelRegistry.models.clear()
    ModelRegistry.models.update(models)
    register_backend(AttentionBackendEnum.CUSTOM, custom)
