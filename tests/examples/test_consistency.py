"""Trained and served with one window: the models of tests/data through the real engine."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import Qwen3Config

import consistency
from consistency import engine_arguments, perplexity, window_options
from tests.helpers.engines import EngineFactory
from tests.helpers.paths import ROOT
from tests.helpers.trained_models import (
    LENGTH,
    MIXED,
    SLIDING,
    TRAINED_WINDOW,
    held_out,
    hugging_face,
)

BELOW, ABOVE = 48, 160  # chunk sizes, beside the models' window
# Far below the 1e-4 that comparing models would need: a window that is wrong by one token
# changes these perplexities by 1e-5 and more, rounding in fp32 by less than 1e-7.
TOLERANCE = 1e-6
CASES = ("own", "half", "double", "full")
# The example's options; ``OVERRIDES`` say the same to Hugging Face.
OPTIONS = dict(zip(CASES, window_options(TRAINED_WINDOW).values(), strict=True))


@pytest.fixture(scope="module")
def sliding(engine: EngineFactory) -> Callable[[str], float]:
    """Perplexity of the all-sliding model through the engine, prefilled in chunks."""

    @cache
    def measure(case: str) -> float:
        llm = engine(
            SLIDING,
            **engine_arguments(Qwen3Config.from_pretrained(SLIDING), LENGTH),
            max_num_batched_tokens=BELOW if case == "own" else ABOVE,
            additional_config={"swa": OPTIONS[case]},
        )
        return perplexity(llm, [held_out(SLIDING)])

    return measure


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Words of the lines that the example printed for the mixed model."""
    text = tmp_path_factory.mktemp("text") / "text"
    text.write_bytes(
        Tokenizer.from_file(str(MIXED / "tokenizer.json")).decode(held_out(MIXED)).encode()
    )
    arguments = ("--model", str(MIXED), "--text", str(text), "--lengths", "512", str(LENGTH))
    command = [sys.executable, "examples/consistency.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()[-len(CASES) - 1 :]]


@pytest.mark.parametrize("case", CASES)
def test_perplexity_of_the_sliding_model_equals_hugging_faces(
    case: str, sliding: Callable[[str], float]
) -> None:
    assert sliding(case) == pytest.approx(hugging_face(SLIDING, case), rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_perplexity_of_the_mixed_model_equals_hugging_faces(
    case: str, printed: list[list[str]]
) -> None:
    (value,) = (float(words[-1]) for words in printed if words[0].startswith(case))
    # Four decimals are printed.
    assert value == pytest.approx(hugging_face(MIXED, case), rel=TOLERANCE, abs=6e-5)


@pytest.mark.parametrize("case", ["one less", "one more"])
def test_tolerance_tells_windows_apart(case: str) -> None:
    """In the model in which the window matters least."""
    other = hugging_face(MIXED, case)
    assert abs(other / hugging_face(MIXED, "own") - 1) > 5 * TOLERANCE


def test_sliding_model_predicts_best_with_its_own_window(
    sliding: Callable[[str], float],
) -> None:
    own, half, double, full = map(sliding, CASES)
    assert own < min(half, double)
    assert full > 1.4 * own


def test_mixed_model_predicts_worse_where_its_sliding_layers_see_more(
    printed: list[list[str]],
) -> None:
    """Half its window is not compared: it costs nothing that could be told from noise."""
    at_trained_length, beyond = ([float(words[i]) for words in printed[1:]] for i in (-2, -1))
    for (own, _, double, full), factor in ((at_trained_length, 1.04), (beyond, 1.1)):
        assert double > 1.02 * own
        assert full > factor * own


def test_example_names_every_window(printed: list[list[str]]) -> None:
    assert printed[0] == ["served", "with", "512", "tokens", "2048", "tokens"]
    rows = [" ".join(words[:-2]) for words in printed[1:]]
    assert rows == ["own window, 64", "half, 32", "double, 128", "full attention"]


def _set_arguments(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["consistency", *arguments])
    # What the example sets where it is unset shall not outlive the test.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1"], "lengths must be 2 to 8888, the tokens of the text; got [1]"),
        (["--lengths", "64", "9000"], "got [64, 9000]"),
        (["--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--model", "nowhere"], "nowhere is no checkpoint: it has no config.json"),
    ],
    ids=["too short", "too long", "no text", "no model"],
)
def test_example_refuses_what_it_cannot_compare(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set_arguments(monkeypatch, *arguments)
    with pytest.raises(SystemExit, match=r"^error: ") as caught:
        consistency.main()
    assert message in str(caught.value)


@pytest.mark.parametrize("window", [None, 1])
def test_example_refuses_a_checkpoint_without_a_window_to_halve(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Qwen3Config(use_sliding_window=window is not None, sliding_window=window).save_pretrained(
        tmp_path
    )
    _set_arguments(monkeypatch, "--model", str(tmp_path))
    with pytest.raises(SystemExit, match=f"sliding_window={window}; give a checkpoint trained"):
        consistency.main()
