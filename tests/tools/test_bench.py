"""`swa bench`: runs, says what it measured, and refuses what makes no sense."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from swa_backend.kernels.plans import Target
from swa_backend.pages import ceil_div
from swa_backend.verify import aot, timing
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.tools.bench.attention import arms
from swa_vllm.tools.bench.attention.arms import OURS, Batch, Call
from swa_vllm.tools.bench.attention.decode_work import decode_work
from swa_vllm.tools.bench.attention.prefill_work import prefill_work
from swa_vllm.tools.bench.attention.stock_kernel import real_triton_for_stock_kernel
from swa_vllm.tools.bench.attention.times import (
    AttentionCase,
    Result,
    judge_targets,
    make_kernel_batch,
    time_kernel_arms,
)
from swa_vllm.tools.bench.kernels import benchmark_kernels
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.scheduler import simulate
from swa_vllm.tools.engines.simulated import Engine
from tests.helpers.processes import Run

H100 = Target("cuda", 90, num_processors=132)
BENCHMARKS = ["serve", "decode", "pages", "prefill", "sinks", "overhead", "kernels"]
PREFILL = ["--shape", "Qwen3-0.6B", "--window", "48", "--max-num-batched-tokens", "128"]


def _files(path: Path) -> list[str]:
    return ["--json", str(path), "--plot", str(path.with_suffix(".png"))]


def _json(result: subprocess.CompletedProcess[str], path: Path) -> Any:
    assert result.returncode == 0, result.stderr[-3000:]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


def test_pages_say_which_pool_is_needed_where_nothing_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--window", "64", "--prompt", "2000", "--output", "8", "--num-requests", "2"]
    assert main(["bench", "pages", *sizes, "--pool-tokens", "1024"]) == 0
    (pool,) = re.findall(
        r"full attention does not start: .* --pool-tokens (\d+)", capsys.readouterr().out
    )
    assert int(pool) == 16 * (ceil_div(2008, 16) + 1)
    assert main(["bench", "pages", *sizes, "--pool-tokens", pool]) == 0
    assert "full attention does not start" not in capsys.readouterr().out


def test_pages_of_an_own_workload(swa: Run, tmp_path: Path) -> None:
    path = tmp_path / "pages.json"
    sizes = {"window": 64, "pool-tokens": 4480, "block-size": 32, "prompt": 2000, "output": 99}
    sizes |= {"num-requests": 64, "max-num-batched-tokens": 2048, "steps-in-flight": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    result = swa("bench", "pages", *flags, *_files(path))
    (workload,) = _json(result, path)["workloads"]
    assert [arm["starts"] for arm in workload["arms"].values()] == [True] * 3
    here, stock = (workload["arms"][name] for name in ("this plugin", "stock vLLM"))
    assert here["peak_pages"] <= 6
    assert stock["peak_pages"] > 60
    assert here["mean_running"] > stock["mean_running"]
    assert "64 x 2000 + 99 tokens, W=64, pool 140 pages of 32" in result.stdout


def test_prefill_gives_the_same_output_and_a_ratio(swa: Run, tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    result = _json(swa("bench", "prefill", *PREFILL, "--rounds", "3", *_files(path)), path)
    assert [case["context"] for case in result["cases"]] == [0, 135, 368]
    assert all(case["attention_ratio"] > 0 for case in result["cases"])


def test_a_window_in_the_prompt_only_is_timed_beside_full_attention(
    swa: Run, tmp_path: Path
) -> None:
    path = tmp_path / "prefill.json"
    more = ("--rounds", "2", "--phase", "prefill", "--prompt", "300")
    result = _json(swa("bench", "prefill", *PREFILL, *more, *_files(path)), path)
    timed = [(case["context"], case["tokens"]) for case in result["cases"]]
    assert timed == [(0, 128), (128, 128), (256, 44), (300, 1)]
    *chunks, decode = result["cases"]
    full, here = (sum(case[f"{arm}_ms"] for case in chunks) for arm in ("full", "here"))
    assert result["prefill_ratio"] == pytest.approx(here / full)
    assert result["prefill_ratio_3_of_4_layers"] == pytest.approx(0.25 + 0.75 * here / full)
    assert result["decode_ratio"] == decode["attention_ratio"]


@pytest.mark.parametrize("shift", [[], ["--shift"]], ids=["plain", "shifted"])
def test_sinks_are_right_and_get_a_ratio(swa: Run, shift: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sinks.json"
    arguments = ("--quick", "--window", "48", "--rounds", "3", *shift, *_files(path))
    cases = _json(swa("bench", "sinks", *arguments), path)["cases"]
    assert len(cases) == 4
    assert all(case["attention_ratio"] > 0 for case in cases)


def test_overhead_compares_scheduler_and_builder(swa: Run, tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    arguments = ("--quick", "--batch", "2", "--rounds", "6", *_files(path))
    figures = _json(swa("bench", "overhead", *arguments), path)
    assert {case["name"].split(",")[0] for case in figures["cases"]} == {
        "scheduler and manager",
        "metadata builder",
        "attention of a layer",
        "together",
    }
    launches = {
        (case["name"], case["batch"]): (case["stock_launches"], case["here_launches"])
        for case in figures["on_gpus"]
    }
    # vLLM's two kernels, of which decodes alone have a third that merges; here decodes and the
    # chunk have a kernel each.
    mixed = "8 decodes and a chunk of 200"
    assert launches == {
        ("metadata builder", "8 decodes"): (0, 0),
        ("attention of a layer", "8 decodes"): (3, 3),
        ("step of 36 layers", "8 decodes"): (108, 108),
        ("metadata builder", mixed): (0, 0),
        ("attention of a layer", mixed): (2, 4),
        ("step of 36 layers", mixed): (72, 144),
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["bench", name, "--help"])
    assert status.value.code == 0
    assert f"example: swa bench {name} " in capsys.readouterr().out


def test_more_run_in_a_tight_pool() -> None:
    """W=64 of chunks of 2048 tokens in 140 pages: what stock vLLM reserves for two requests."""
    engine = Engine(64, 32, 140, 2048, 8192)
    stock, here = (simulate(arm, engine, [(2000, 200)] * 64) for arm in (Arm.STOCK, Arm.SWA))
    assert here.mean_running > 1.4 * stock.mean_running
    assert here.num_steps < 0.7 * stock.num_steps
    assert here.peak_pages == here.promised_pages == 6
    assert here.num_preemptions == 0


def test_an_engine_that_stock_refuses_starts() -> None:
    engine = Engine(1024, 16, 2048, 16384, 40960, num_steps_in_flight=2)
    assert not simulate(Arm.STOCK, engine, []).starts
    assert simulate(Arm.SWA, engine, [(20000, 4)] * 4).num_steps > 0


def test_a_run_that_stops_early_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SWAManager, "_admission_charge", lambda *args: 1000)  # more than there are
    with pytest.raises(RuntimeError, match="this plugin stopped with requests that it cannot"):
        simulate(Arm.SWA, Engine(64, 32, 140, 2048, 8192), [(2000, 200)])


def test_json_alone_on_stdout(swa: Run) -> None:
    flags = ("--window", "64", "--prompt", "300", "--output", "4", "--num-requests", "2")
    result = swa("bench", "pages", *flags, "--json", "-")
    assert json.loads(result.stdout)["workloads"][0]["workload"] == "requests"
    assert "a decoding request needs" in result.stderr


def test_kernels_without_a_gpu_are_compared_by_what_they_do(swa: Run, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    result = swa("bench", "kernels", "--quick", *_files(path))
    figures = _json(result, path)
    assert figures["device"] is None
    assert "nothing is timed" in result.stdout
    assert "GB loaded here" in result.stdout
    assert len(figures["prefill"]) == 2
    assert figures["compiled"]["here"]["kv_buffers"] >= 2
    assert figures["compiled"]["stock"]["kv_buffers"] == 1
    assert figures["compiled"]["stock"]["load_bytes"] == 16


@pytest.mark.parametrize("context", [0, 1000, 8192, 131077])
@pytest.mark.parametrize("window", [512, 1024, 4096])
def test_prefill_loads_a_key_for_many_rows(window: int, context: int) -> None:
    work = prefill_work(H100, window, context, num_queries=8192, group=4)
    assert work["here"].num_keys * 7 <= work["stock"].num_keys
    # A small window fills less of the first and last tile, which are large on an H100.
    assert work["here"].tile_work <= (1.13 if window == 512 else 1.07)


def test_a_split_of_the_text_leaves_programs_idle() -> None:
    work = decode_work(H100, AttentionCase(1024, 131072, 1, torch.bfloat16))
    assert (work["stock_programs"], work["stock_useful"]) == (128, 8)
    assert 1 < work["stock_read"] < 1.04


def test_kernels_cannot_be_compiled_under_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--quick"]) == 1
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


SMALL = AttentionCase(64, 150, 2, torch.float16, num_kv_heads=1, group=2, dtype=torch.float16)


def _each_takes(microseconds: float) -> Callable[[Sequence[Call]], float]:
    def clock(calls: Sequence[Call]) -> float:
        for call in calls:
            call()
        return microseconds

    return clock


def _zeros(batch: Batch) -> list[Call]:
    return [lambda: torch.zeros_like(batch.query)]


def test_gpu_benchmark_runs_through(capsys: pytest.CaptureFixture[str]) -> None:
    """With Triton's interpreter for the GPU, also under vLLM's kernel, and a clock that stands."""
    cases = [SMALL, replace(SMALL, num_queries=70)]
    with real_triton_for_stock_kernel(aot.triton_modules()):
        figures = benchmark_kernels(
            "Qwen3-8B", cases, torch.device("cpu"), _each_takes(3.0), num_bytes=1 << 16
        )
    json.dumps(figures)
    for case in figures["cases"]:
        assert case["us"] == {OURS: 3.0, "TRITON_ATTN": 3.0}
        assert "flashinfer" in case["not_timed"]["FlashInfer"]
    assert [case["num_queries"] for case in figures["cases"]] == [1, 1, 70, 70]
    assert figures["copy_gb_per_s"] == pytest.approx(2 * (1 << 16) / 3.0 / 1e3)
    printed = capsys.readouterr().out
    for text in ("decodes, cache", "chunks, cache", "TFLOP/s", "not measured"):
        assert text in printed


def test_wrong_output_is_not_timed() -> None:
    batch = make_kernel_batch(SMALL, torch.device("cpu"), cold_bytes=2 * SMALL.num_bytes)
    assert len(batch.tables) == 2
    result = time_kernel_arms(
        SMALL, batch, {OURS: arms.our_kernels, "wrong": _zeros}, _each_takes(3.0)
    )
    assert result.times == {OURS: 3.0}
    assert result.refused["wrong"].startswith("wrong: off by")


def test_own_kernel_must_be_right_before_it_is_timed() -> None:
    batch = make_kernel_batch(SMALL, torch.device("cpu"), cold_bytes=1)
    with pytest.raises(RuntimeError, match=r"off by .*, allowed is"):
        time_kernel_arms(SMALL, batch, {OURS: _zeros}, _each_takes(1.0))


def test_other_arms_refuse_what_they_cannot_do() -> None:
    case = replace(SMALL, kv_dtype=torch.float8_e4m3fn)
    batch = make_kernel_batch(case, torch.device("cpu"), cold_bytes=1)
    with pytest.raises(ValueError, match="wants fp8 queries too"):
        arms.flash_attn(batch)
    with pytest.raises(ValueError, match="has no fp8 cache"):
        arms.xformers(batch)


def _result(seq_len: int, batch: int, window: int = 1024, **times: float) -> Result:
    return Result(AttentionCase(window, seq_len, batch, torch.bfloat16), times)


def test_targets_say_met_missed_or_not_measured() -> None:
    results = [
        _result(8192, 1, here=7.0, FLASH_ATTN=7.0),
        _result(131072, 1, here=7.7, TRITON_ATTN=30.0),
        _result(8192, 64, here=100.0, FLASH_ATTN=80.0),
    ]
    met = {t["target"]: t["met"] for t in judge_targets(results, copied=3000.0)}
    assert met == {
        "us at batch 1, W <= 1024: at most 8.0": True,
        "us at batch 1, W = 4096: at most 14.0": None,
        "of copy bandwidth at batch 64: at least 0.85": True,
        "time at 128k tokens / at 8k: at most 1.05": False,
        "time / TRITON_ATTN's, batch 1, n >= 32k: at most 0.5": True,
        "time / FLASH_ATTN's: at most 1.05": False,
    }


def test_time_of_a_graph_is_shared_among_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds of the whole become microseconds of each."""
    called: list[int] = []

    def bench(run: Callable[[], None], **_: Any) -> float:
        run()
        return 6.0

    monkeypatch.setattr(timing.triton.testing, "do_bench_cudagraph", bench)
    calls = [partial(called.append, index) for index in range(3)]
    assert timing.median_us(calls) == 2000.0
    assert called == [0, 1, 2]
