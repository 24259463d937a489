"""Random configurations and requests: the real engine against a dense model.

One case takes about a second. ``SWA_TEST_SEED`` is the first seed, for cases that nobody ran yet:
these fail by a wrong token or page alone, and the summary says what happened in how many of them.
"""

import gc
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms.cpu import CpuPlatform

from swa_vllm.attention.cpu.backend import SWACPUImpl
from swa_vllm.attention.cpu.ghost_tail import SinkCopies
from swa_vllm.kv_cache.manager import SWAManager
from tests.engine.fuzz_cases import AIMS, Case, Job, random_case
from tests.engine.fuzz_run import FREED_BY_ANSWERS, Run, measure
from tests.helpers.engines import EngineFactory, ModelFactory, generate
from tests.helpers.tiny_models import SLIDING, random_prompts, save_tiny_model

pytestmark = pytest.mark.long

FIRST_SEED = int(os.environ.get("SWA_TEST_SEED", "0"))
SEEDS = [range(FIRST_SEED + first, FIRST_SEED + first + 10) for first in range(0, 40, 10)]
MANY_SEEDS = [range(FIRST_SEED + first, FIRST_SEED + first + 50) for first in range(40, 2040, 50)]
EVENTS = (*AIMS, "aborts", "preemptions", "prefix hits", "pages freed by a window")
NUM_OTHERS = 32  # models that tell the noise where one does not
MIN_TOKENS = 30  # that make an average
# Cases that stay, whatever is chosen at random: as printed, one that failed goes here. Each with
# what happens in it.
KEPT = {
    "all at once in a pool for one": (
        EVENTS,
        Case(
            dtype="float32",
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope="yarn",
            tied=False,
            windowed=(True, False, True),
            by_checkpoint=False,
            window=33,
            sinks=33,
            shift=True,
            prefill_pages="auto",
            page_size=32,
            num_pages=22,
            max_length=180,
            chunk=160,
            max_requests=4,
            caching=True,
            is_async=True,
            batches=(
                (Job(0, 120, 9, 40), Job(0, 120, 20, 40, 2), Job(1, 64, 30, 80, 1, 3, 20)),
                (Job(0, 120, 9, 40), Job(0, 97, 0, 40, 3, 2), Job(1, 64, 1, 9, 1, 5, 0, True)),
            ),
        ),
    ),
    "what is seen is shifted sinks, whose angles are rounded twice": (
        EVENTS,
        Case(
            dtype="float32",
            num_heads=1,
            num_kv_heads=1,
            head_dim=32,
            rope="default",
            tied=False,
            windowed=(True, False),
            by_checkpoint=True,
            window=2,
            sinks=32,
            shift=True,
            prefill_pages="survivors",
            page_size=32,
            num_pages=23,
            max_length=256,
            chunk=512,
            max_requests=8,
            caching=True,
            is_async=True,
            batches=(
                (
                    Job(0, 158, 31, 55),
                    Job(0, 150, 0, 78, 3),
                    Job(0, 131, 21, 93),
                    Job(0, 0, 171, 1, 1, 0, 21),
                    Job(1, 0, 214, 26, 2),
                ),
                (Job(0, 150, 0, 78, 3), Job(0, 131, 21, 93), Job(0, 158, 31, 55)),
            ),
        ),
    ),
    "long answers in a pool for one": (
        ("aborts", "shortages of pages", "preemptions", FREED_BY_ANSWERS),
        Case(
            dtype="float32",
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            rope="default",
            tied=False,
            windowed=(True, False, True),
            by_checkpoint=False,
            window=9,
            sinks=33,
            shift=False,
            prefill_pages="auto",
            page_size=32,
            num_pages=25,
            max_length=180,
            chunk=70,
            max_requests=4,
            caching=True,
            is_async=True,
            batches=(
                (Job(0, 60, 4, 99), Job(0, 60, 9, 90, 2), Job(1, 31, 3, 80, 1, 3, 20)),
                (Job(0, 60, 4, 99), Job(0, 7, 0, 99, 3, 2), Job(1, 31, 3, 90, 1, 5, 0, True)),
            ),
            phase="decode",
        ),
    ),
    "a second sound implementation is luckier": (
        ("aborts", "preemptions", "prefix hits"),
        Case(
            dtype="float32",
            num_heads=4,
            num_kv_heads=1,
            head_dim=80,
            rope="linear",
            tied=True,
            windowed=(True, False),
            by_checkpoint=True,
            window=129,
            sinks=0,
            shift=False,
            prefill_pages="survivors",
            page_size=64,
            num_pages=9,
            max_length=213,
            chunk=64,
            max_requests=7,
            caching=True,
            is_async=True,
            batches=(
                (
                    Job(0, 52, 0, 31, 3, 5, 12, True),
                    Job(1, 0, 54, 64, 1, 12),
                    Job(1, 111, 21, 42, 3, 14),
                ),
                (
                    Job(1, 4, 0, 1, 3, 0, 0, True),
                    Job(1, 99, 0, 3),
                    Job(0, 18, 0, 1, 1, 0, 0, True),
                    Job(1, 81, 11, 89, 1, 0, 8),
                    Job(1, 0, 111, 1, 1, 0, 0, True),
                ),
            ),
        ),
    ),
}

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def quick_engine(engine: EngineFactory, tiny_model: ModelFactory) -> Iterator[EngineFactory]:
    """Engines that start in a third of a second.

    Otherwise each start and stop lets the garbage collector look at all that was ever imported,
    several times, and vLLM look for kernels in all modules.
    """
    with pytest.MonkeyPatch.context() as patch:
        search = CpuPlatform.register_triton_kernel_overrides
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(cache(search)))
        generate(engine(tiny_model(**SLIDING)), random_prompts([8]), num_tokens=2)
        engine.stop()  # type: ignore[attr-defined]
        gc.freeze()
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield engine
        engine.stop()  # type: ignore[attr-defined]
    gc.unfreeze()


def _check(case: Case, engine: EngineFactory, directory: Path) -> Counter[str]:
    model = save_tiny_model(directory, **case.checkpoint)
    run = Run(case, engine(model, **case.engine))
    scored = run.serve()
    # The engine is no further from the exact result than another sound implementation: than the
    # worst of some, for the few cases in a thousand in which the first is lucky.
    for orders in (None,), range(NUM_OTHERS):
        errors = measure(case, model, scored, orders)
        if max(errors.largest, errors.choice) <= errors.largest_noise:
            break
    assert max(errors.largest, errors.choice) <= errors.largest_noise, errors
    if errors.num_tokens >= MIN_TOKENS:
        assert errors.usual <= 2 * errors.usual_noise, errors
    return run.happened


def _check_all(
    cases: Iterable[tuple[object, Case]], engine: EngineFactory, tmp_path: Path, record: Record
) -> Counter[str]:
    """Run all cases, whether or not some fail.

    Returns:
        In how many cases each event happened.
    """
    happened, seen_in, failures = Counter[str](), Counter[str](), []
    for name, case in cases:
        happened["configurations"] += 1
        try:
            events = _check(case, engine, tmp_path / str(name))
        except Exception:
            failures.append(f"{traceback.format_exc()}case {name}: {case!r}\n")
            engine.stop()  # type: ignore[attr-defined]
            continue
        happened += events
        happened["a window in the prompt only"] += case.phase == "prefill"
        happened["a window in the answer only"] += case.phase == "decode"
        seen_in += Counter(event for event in (*EVENTS, FREED_BY_ANSWERS) if events[event])
    windows = "a window in the prompt only", "a window in the answer only"
    for event in ("configurations", *windows, "requests", "steps", "preemptions"):
        record(f"summary: fuzz, {event}", happened[event])
    for event in (*EVENTS, FREED_BY_ANSWERS):
        record(f"summary: fuzz, configurations with {event}", seen_in[event])
    assert not failures, f"{len(failures)} failed\n" + "\n".join(failures)
    return seen_in


def _check_seeds(
    seeds: range, engine: EngineFactory, tmp_path: Path, record_property: Record
) -> Counter[str]:
    cases = ((seed, random_case(seed)) for seed in seeds)
    return _check_all(cases, engine, tmp_path, record_property)


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_engine_equals_a_dense_model(
    seeds: range, quick_engine: EngineFactory, tmp_path: Path, record_property: Record
) -> None:
    seen_in = _check_seeds(seeds, quick_engine, tmp_path, record_property)
    if FIRST_SEED == 0:  # what other cases meet is theirs
        assert all(seen_in[event] > 0 for event in EVENTS), seen_in
        assert all(3 * seen_in[aim] >= len(seeds) for aim in AIMS), seen_in


@pytest.mark.parametrize("name", KEPT)
def test_kept_cases(
    name: str, quick_engine: EngineFactory, tmp_path: Path, record_property: Record
) -> None:
    events, case = KEPT[name]
    seen_in = _check_all([(name, case)], quick_engine, tmp_path, record_property)
    assert all(seen_in[event] for event in events), seen_in


@pytest.mark.full
@pytest.mark.parametrize("seeds", MANY_SEEDS, ids=str)
def test_engine_equals_a_dense_model_in_many_cases(
    seeds: range, quick_engine: EngineFactory, tmp_path: Path, record_property: Record
) -> None:
    _check_seeds(seeds, quick_engine, tmp_path, record_property)


def _see_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    init = SWACPUImpl.__init__

    def init_wrongly(self: SWACPUImpl, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.sliding_window += 1

    monkeypatch.setattr(SWACPUImpl, "__init__", init_wrongly)


def _free_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = SWAManager.get_num_skipped_tokens
    monkeypatch.setattr(SWAManager, "get_num_skipped_tokens", lambda s, n: skipped(s, n + 1))


def _see_no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SinkCopies, "copy", lambda self, kv_cache, pages: None)


@pytest.mark.parametrize(
    ("break_it", "seed"), [(_see_one_more, 11), (_free_one_token_early, 26), (_see_no_sinks, 26)]
)
def test_mistakes_are_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    seed: int,
    quick_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    break_it(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        _check(random_case(seed), quick_engine, tmp_path)
    quick_engine.stop()  # type: ignore[attr-defined]
    record_property("summary: mutants killed", 1)
