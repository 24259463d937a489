"""The README's table of results, from the figures that the benchmarks wrote to ``results/``.

python examples/results_table.py
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
HERE, STOCK, FULL, HF = "this plugin", "stock vLLM", "full attention", "Hugging Face"
_ARMS = (HERE, STOCK, FULL, HF)
Figures = Mapping[str, Any]
Row = tuple[str, Mapping[str, str]]


def table(directory: Path = RESULTS) -> str:
    """Markdown of the files that are there; the cells of a file's rows were measured in one run."""
    lines = [f"| | {' | '.join(_ARMS)} |", f"|{' --- |' * (len(_ARMS) + 1)}"]
    for name, rows in _ROWS.items():
        path = directory / f"{name}.json"
        figures = json.loads(path.read_text()) if path.exists() else None
        for label, cells in rows(figures) if figures else ():
            lines.append(f"| {label} | {' | '.join(cells.get(arm, '-') for arm in _ARMS)} |")
    return "\n".join(lines)


def _tight(figures: Figures) -> Iterator[Row]:
    pooled = {name: arm for name, arm in figures["peers"].items() if name != HF}
    yield f"{_work(figures)}, pool of two full ones: tokens/s", _medians(figures, "output", 1)
    yield "- requests at once, mean", _medians({"peers": pooled}, "running", 1)
    yield "- preemptions", _medians({"peers": pooled}, "preemptions", 0)
    yield "- TTFT p99, s", _medians(figures, "ttft_p99_ms", 1, 1e-3)
    yield "- TPOT p50, ms", _medians(figures, "tpot_p50_ms", 0)
    yield _times_as_fast(figures)


def _plentiful(figures: Figures) -> Iterator[Row]:
    yield f"{_work(figures)}, room for all: tokens/s", _medians(figures, "output", 1)
    yield "- prefill, tokens/s", _medians(figures, "prefill", 0)
    yield "- decoding, tokens/s", _medians(figures, "decode", 1)
    yield _times_as_fast(figures)


def _decode(figures: Figures) -> Iterator[Row]:
    head = f"W={figures['window']}, a step of {figures['batch']} requests"
    yield f"{head}: 32k of context / 2k", _growth(figures, "decode_s", 2048)
    yield "- a prompt token: 32k / 4k", _growth(figures, "prefill_s", 4096)


def _overhead(figures: Figures) -> Iterator[Row]:
    for caching in ("off", "on"):
        name = f"together, prefix caching {caching}"
        cases = [case for case in figures["cases"] if case["name"] == name]
        lengths = ", ".join(f"{case['context'] // 1000}k" for case in cases)
        label = f"us a step without the model, {figures['batch']} requests of {lengths}"
        yield (
            f"{label}, prefix caching {caching}",
            {
                arm: ", ".join(str(case[key]) for case in cases)
                for arm, key in ((HERE, "here_us"), (STOCK, "stock_us"))
            },
        )


def _work(figures: Figures) -> str:
    count = figures["num_requests"]
    each = (figures[key] // count for key in ("prompt_tokens", "output_tokens"))
    return f"{count} requests of {' + '.join(map(str, each))} tokens, W={figures['window']}"


def _times_as_fast(figures: Figures) -> Row:
    ratios = figures["ratios"].items()
    return f"- {HERE}, times as fast", {name: f"{ratio:.2f}" for name, ratio in ratios}


def _medians(figures: Figures, key: str, digits: int, factor: float = 1.0) -> dict[str, str]:
    return {
        name: f"{factor * arm[key]['median']:.{digits}f}" for name, arm in figures["peers"].items()
    }


def _growth(figures: Figures, key: str, shortest: int) -> dict[str, str]:
    at = {(c["peer"], c["context"]): c[key]["median"] for c in figures["cases"]}
    names = dict.fromkeys(case["peer"] for case in figures["cases"])
    return {name: f"{at[name, 32768] / at[name, shortest]:.2f}" for name in names}


_ROWS: dict[str, Callable[[Figures], Iterator[Row]]] = {
    "serve-tight": _tight,
    "serve-plentiful": _plentiful,
    "decode": _decode,
    "overhead": _overhead,
}


if __name__ == "__main__":
    print(table())
