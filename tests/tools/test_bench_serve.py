"""`swa bench serve` and `swa bench decode`: the same work for all, checked before it is timed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from swa_vllm.tools.bench.serve import serve_benchmark_losses
from swa_vllm.tools.bench.serving import rounds
from swa_vllm.tools.bench.serving.arms import SERVING_ARMS, ServingArm
from swa_vllm.tools.bench.serving.bound import interpolate_step_time, makespan
from swa_vllm.tools.bench.serving.checkpoints import make_windowed_checkpoint
from swa_vllm.tools.bench.serving.launcher import Launcher
from swa_vllm.tools.bench.serving.process import ArmProcess
from swa_vllm.tools.bench.serving.records import ServedWorkload, Step, Timed, percentile
from swa_vllm.tools.bench.serving.vllm_engine import SteppedEngine
from swa_vllm.tools.bench.serving.workload import MIXES, Ask, read_trace
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.scheduler import simulate
from swa_vllm.tools.engines.simulated import Engine
from tests.helpers.engines import EngineFactory, ModelFactory
from tests.helpers.processes import Run
from tests.helpers.tiny_models import FULL, SLIDING

PNG = b"\x89PNG"


@pytest.fixture
def bench(swa: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark and gives its figures; it draws, too."""
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"

    def run(*arguments: str) -> dict[str, Any]:
        result = swa("bench", *arguments, "--json", str(figures), "--plot", str(picture))
        assert result.returncode == 0, result.stderr[-3000:]
        assert picture.read_bytes().startswith(PNG)
        return dict(json.loads(figures.read_text()))

    return run


def test_arms_serve_the_same_workload_in_turns(
    bench: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt_tokens": 40, "output_tokens": 30}\n' * 6)
    arguments = [
        "--trace",
        str(trace),
        "--window",
        "32",
        "--max-num-batched-tokens",
        "64",
        "--threads",
        "1",
    ]
    figures = bench("serve", *arguments, "--once", "hf", "--peers", "here,stock,hf")
    here, stock, hf = (
        figures["peers"][SERVING_ARMS[name].name] for name in ("here", "stock", "hf")
    )
    assert [arm["rounds"] for arm in (here, stock, hf)] == [2, 2, 1]
    assert figures["checked"]["equal"] == [
        [SERVING_ARMS[name].name for name in ("here", "stock", "hf")]
    ]
    assert figures["pool_pages"] == 6  # three pages each, two requests
    assert here["peak_pages"]["high"] <= 6
    assert [arm["curve"][-1][1] for arm in (here, stock, hf)] == [6 * 30] * 3
    assert set(figures["bound"]["step_s"]) == {"1", "2", "3"}
    assert 0 < figures["bound"]["reached"] < 1.5
    assert figures["conditions"]["threads"] == 1


@pytest.mark.full
def test_a_window_in_the_prompt_only_is_served_beside_full_attention(
    bench: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt_tokens": 90, "output_tokens": 20}\n' * 3)
    arguments = ["--trace", str(trace), "--window", "32", "--phase", "prefill", "--threads", "1"]
    figures = bench("serve", *arguments, "--peers", "here,stock,full", "--rounds", "1")
    here, stock, full = (
        figures["peers"][SERVING_ARMS[name].name] for name in ("here", "stock", "full")
    )
    assert figures["phase"] == "prefill"
    assert figures["checked"]["tokens"] == 1  # later ones see what stock vLLM hides
    assert figures["same_tokens"] == {"this plugin": 1.0}
    # Every page stays: the pool is one of two requests.
    assert here["peak_running"]["high"] == full["peak_running"]["high"] == 2
    assert figures["bound"]["concurrency"] == 2
    assert stock["peak_running"]["high"] > 2


def test_a_window_in_generated_tokens_only_is_served_beside_full_attention(
    bench: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt_tokens": 40, "output_tokens": 300}\n' * 3)
    arguments = ["--trace", str(trace), "--window", "32", "--phase", "decode", "--threads", "1"]
    figures = bench("serve", *arguments, "--peers", "here,full", "--rounds", "1")
    here, full = (figures["peers"][SERVING_ARMS[name].name] for name in ("here", "full"))
    assert figures["phase"] == "decode"
    assert figures["checked"]["tokens"] == 1
    # A prompt predicts the first token, by full attention.
    (equal,) = figures["checked"]["equal"]
    assert set(equal) == {SERVING_ARMS[name].name for name in ("here", "full")}
    assert figures["same_tokens"] == {"this plugin": 1.0}
    # The pool holds two requests of full attention, 22 pages, or three that keep their prompts: two
    # pages of it, two of the window, and two for the slots behind it.
    assert figures["bound"]["concurrency"] == 3
    assert here["preemptions"]["high"] == 0 < full["preemptions"]["low"]


def test_a_decoded_token_is_timed_at_each_length(
    bench: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    arguments = ["--window", "32", "--steps", "4", "--rounds", "2", "--threads", "1"]
    figures = bench("decode", *arguments, "--contexts", "64,200", "--peers", "here")
    assert [case["context"] for case in figures["cases"]] == [64, 200]
    assert all(case["decode_s"]["low"] > 0 for case in figures["cases"])
    assert set(figures["growth"]["this plugin"]) == {"decode_s", "prefill_s"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "--contexts", "64", "--batch", "1", "--window", "16"],
        ["serve", "--mix", "prefill", "--num-requests", "2", "--window", "2000"],
    ],
    ids=["decode", "serve"],
)
def test_the_smallest_pool_is_enough_for_stock_vllm_to_start(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its admission charges a window a page more than its text has."""
    engines = []

    def start(launcher: Launcher, arm: ServingArm, **engine: Any) -> ArmProcess:
        engines.append({**launcher.engine, **engine})
        raise RuntimeError("it would start")

    monkeypatch.setattr(Launcher, "start", start)
    assert main(["bench", *arguments, "--peers", "here,stock"]) == 1
    (asked,) = engines
    engine = Engine(
        int(arguments[arguments.index("--window") + 1]),
        asked["block_size"],
        asked["num_gpu_blocks_override"],
        asked["max_num_batched_tokens"],
        asked["max_model_len"],
    )
    assert simulate(Arm.STOCK, engine, []).starts


RECORDING = {
    "scheduler_cls": "swa_vllm.tools.bench.serving.vllm_engine.RecordingScheduler",
    "async_scheduling": False,
}


def test_steps_of_those_that_fit_are_timed_where_not_all_do(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """A pool that never holds the batch once left no step to take the median of."""
    llm = engine(tiny_model(**FULL), max_model_len=128, num_gpu_blocks_override=1 + 8, **RECORDING)
    answer = SteppedEngine(llm).decode(3, num_prompt=70, num_steps=4, seed=0, on_progress=print)
    assert answer["batch"] == 2  # three pages each
    assert answer["decode_s"] > 0
    assert [len(tokens) for tokens in answer["tokens"]] == [4 + 1 + 1] * 3


def test_all_decode_together_behind_prompts_of_many_chunks(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """The first once had its tokens before the last prompt was computed."""
    llm = engine(tiny_model(**SLIDING), max_num_batched_tokens=64, **RECORDING)
    answer = SteppedEngine(llm).decode(3, num_prompt=200, num_steps=4, seed=0, on_progress=print)
    assert answer["batch"] == 3
    assert len(answer["tokens"][0]) > 4 + 200 // 64


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"arrival": -1, "prompt_tokens": 1, "output_tokens": 1}',
        '{"arrival": 0, "prompt_tokens": 1.5, "output_tokens": 1}',
        '{"arrival": 0, "prompt_tokens": 1}',
        "[]",
    ],
)
def test_a_wrong_line_of_a_trace_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival": 0.5, "prompt_tokens": 3, "output_tokens": 4}\n' + line)
    with pytest.raises(ValueError, match="line 2: each line is an object such as"):
        read_trace(path)


def test_a_trace_is_sorted_by_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{{"arrival": {}, "prompt_tokens": 3, "output_tokens": 4}}\n'
    path.write_text(line.format(2) + "\n" + line.format(0.5))
    assert read_trace(path) == [Ask(0.5, 3, 4), Ask(2.0, 3, 4)]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no requests"):
        read_trace(path)


def test_mixes_are_the_same_for_a_seed() -> None:
    assert MIXES["decode"](2, 0) == [Ask(0.0, 256, 1024)] * 2
    chat = MIXES["chat"](50, 0)
    assert chat == MIXES["chat"](50, 0) != MIXES["chat"](50, 1)
    assert [ask.arrival for ask in chat] == sorted(ask.arrival for ask in chat)
    assert len({ask.prompt_tokens for ask in chat}) > 20


@pytest.mark.parametrize(
    ("asks", "concurrency", "seconds"),
    [
        ([Ask(0, 10, 5)], 1, 1.0 + 4 * 1),
        ([Ask(0, 10, 5)] * 2, 2, 2.0 + 4 * 1.5),  # a step of two takes 1.5
        ([Ask(0, 10, 5)] * 2, 1, 2 * (1.0 + 4 * 1)),
        ([Ask(0, 10, 1)] * 3, 1, 3.0),  # prefill gives the only token
        ([Ask(0, 10, 5), Ask(90, 10, 1)], 2, 91.0),  # idle until the second comes
        ([Ask(0, 10, 3), Ask(0, 10, 5)], 2, 2.0 + 2 * 1.5 + 2 * 1),
    ],
)
def test_least_time_by_hand(asks: Sequence[Ask], concurrency: int, seconds: float) -> None:
    assert makespan(asks, concurrency, 0.1, {1: 1.0, 3: 2.0}) == pytest.approx(seconds)


def test_steps_between_and_beyond_those_measured() -> None:
    times = {2: 1.0, 4: 3.0}
    assert [interpolate_step_time(times, n) for n in (1, 2, 3, 4, 9)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_summary_by_hand() -> None:
    steps = [Step(8, 0, 2, 4, 0, 2, 2.0), Step(0, 2, 2, 5, 1, 2, 1.0), Step(0, 1, 1, 3, 0, 1, 0.5)]
    requests = [Timed(2.0, 3.0, [1, 2]), Timed(2.0, 3.5, [1, 2, 3])]
    summary = ServedWorkload(5.0, steps, requests).summary()
    assert summary["output"] == 1.0
    assert summary["prefill"] == 4.0
    assert summary["decode"] == 2.0
    assert (summary["ttft_p50_ms"], summary["tpot_p50_ms"]) == (2000.0, 875.0)
    assert (summary["running"], summary["peak_running"]) == (pytest.approx(5 / 3), 2)
    assert (summary["peak_pages"], summary["preemptions"]) == (5, 1)
    assert ServedWorkload(5.0, steps, requests).curve() == [(0.0, 0), (2.0, 2), (3.0, 4), (3.5, 5)]


def test_ratio_is_of_the_rounds_that_both_served() -> None:
    """Where the machine slows down: the medians of each arm's own rounds are 1.5 apart."""
    here, other = (
        [ServedWorkload(float(n), [], []) for n in seconds] for seconds in ((2, 4, 9), (4, 9, 6))
    )
    assert rounds._ratio_of_rounds(here, other) == 2.0
    assert rounds._ratio_of_rounds(here, other[:1]) == 2.0  # of one that served once


def test_percentiles() -> None:
    assert percentile([], 99) == 0
    assert percentile([3.0], 99) == 3.0
    assert percentile([float(n) for n in range(101)], 99) == 99.0


def test_losses_are_named() -> None:
    metrics = {"output", "prefill", "decode"} | {
        f"t{x}_p{p}_ms" for x in ("tft", "pot") for p in (50, 99)
    }
    here = {name: {"median": 10.0} for name in metrics}
    faster = {**here, "output": {"median": 12.0}, "tpot_p50_ms": {"median": 5.0}}
    slower = {**here, "output": {"median": 8.0}, "tpot_p50_ms": {"median": 50.0}}
    arms = {
        SERVING_ARMS["here"].name: here,
        SERVING_ARMS["stock"].name: faster,
        SERVING_ARMS["full"].name: slower,
    }
    assert serve_benchmark_losses({"peers": arms}) == [
        "tokens/s, stock vLLM is 1.20 times better",
        "TPOT p50, ms, stock vLLM is 2.00 times better",
    ]


class Parrot(ArmProcess):
    """An arm that answers every request with one token, without a process."""

    def __init__(self, name: str, token: int) -> None:
        self.name, self._token = name, token

    def ask(self, command: str, *_: Any, **arguments: Any) -> Any:
        requests = [{"tokens": [self._token] * n} for n in arguments["outputs"]]
        return {"seconds": 1.0, "steps": [], "requests": requests}


def test_arms_that_disagree_are_not_timed(tiny_model: Any) -> None:
    arms = {name: SERVING_ARMS[name] for name in ("here", "stock", "full")}
    launcher = Launcher(dict.fromkeys((True, False), tiny_model()), "float32", 1, {})
    work = rounds.Rounds([Ask(0, 100, 100)], 32, 1, frozenset(), 0)
    running = {name: Parrot(arm.name, int(name == "full")) for name, arm in arms.items()}
    checked = rounds._check_same_answers(launcher, arms, work, running)
    assert checked["equal"] == [["this plugin", "stock vLLM"], ["full attention"]]
    running["stock"] = Parrot("stock vLLM", 1)
    with pytest.raises(RuntimeError, match="this plugin and stock vLLM give other tokens"):
        rounds._check_same_answers(launcher, arms, work, running)


def test_an_arm_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Hugging Face: .*nowhere"):
        Launcher({True: tmp_path / "nowhere"}, "float32", 1, {}).start(SERVING_ARMS["hf"])


def test_an_arm_that_dies_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"x ended with status 1:\n(.|\n)*No module named"):
        ArmProcess("x", "swa_vllm.tools.no_such_arm", {}, {})


def test_a_checkpoint_gets_a_window_or_none(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    sliding = json.loads(
        (make_windowed_checkpoint(model, tmp_path / "a", 64) / "config.json").read_text()
    )
    full = json.loads(
        (make_windowed_checkpoint(tmp_path / "a", tmp_path / "b", None) / "config.json").read_text()
    )
    assert (sliding["sliding_window"], sliding["max_window_layers"]) == (64, 0)
    assert (full["sliding_window"], full["use_sliding_window"]) == (None, False)
    assert (tmp_path / "b" / "model.safetensors").samefile(model / "model.safetensors")


def test_other_models_have_no_common_window(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a 'llama'; peers share a window in a dense Qwen3"):
        make_windowed_checkpoint(tiny_llama, tmp_path / "a", 64)
