"""`swa tune` on a trained model: what it finds, what it prints, and that it can be served so."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from swa_backend.window import Phase
from swa_vllm.tools.cli import main
from swa_vllm.tools.engines.forced import ForcedTokens
from swa_vllm.tools.engines.needles import make_needles
from swa_vllm.tools.engines.scoring import ScoringEngine
from swa_vllm.tools.engines.setup import Setup
from swa_vllm.tools.engines.texts import tokenizer_of
from swa_vllm.tools.tune.candidates import FULL, Candidate
from swa_vllm.tools.tune.journal import Journal
from swa_vllm.tools.tune.measure import Measurements
from swa_vllm.tools.tune.requests import Request
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.processes import Run
from tests.helpers.trained_models import SLIDING, TEXT, TRAINED_WINDOW, text_tokens

pytestmark = pytest.mark.long

PROMPT, ANSWER, NUM_REQUESTS = 192, 128, 13
# It leaves few candidates, the window of training among them; test_tune_search.py has others.
BUDGET = ["--budget", "0.4"]
SIZES = ["--dtype", "float32", "--block-size", "32", "--sink-tokens", "0"]


def write_traffic(path: Path, prompt: int, answer: int, num_requests: int) -> Path:
    """Cut a book into prompts, and answers that go on with them."""
    tokenizer = AutoTokenizer.from_pretrained(SLIDING)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    lines = []
    for first in range(0, num_requests * (prompt + answer), prompt + answer):
        cut, end = first + prompt, first + prompt + answer
        record = {
            "prompt": tokenizer.decode(tokens[first:cut]),
            "answer": tokenizer.decode(tokens[cut:end]),
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "traffic.jsonl"
    return write_traffic(path, PROMPT, ANSWER, NUM_REQUESTS)


def tune(
    swa: Run, traffic: Path, *more: str, model: Path = SLIDING
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the command in a process of its own, for its engines; returns its end and figures."""
    path = traffic.with_name("figures.json")
    done = swa("tune", str(model), *SIZES, "--requests", str(traffic), "--json", str(path), *more)
    assert done.returncode in (0, 3), done.stderr
    return done, json.loads(path.read_text())


@pytest.fixture(scope="module")
def journal(traffic: Path) -> Path:
    return traffic.with_name("scores.jsonl")


@pytest.fixture(scope="module")
def found(swa: Run, traffic: Path, journal: Path) -> dict[str, Any]:
    picture = traffic.with_name("front.png")
    resumed = ["--resume", str(journal), "--plot", str(picture)]
    done, figures = tune(swa, traffic, *BUDGET, *resumed)
    assert done.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    return figures


def test_the_window_of_training_is_found(found: dict[str, Any]) -> None:
    """Within one step of the grid: 48, 64, 96."""
    window = found["additional_config"]["swa"]["window"]
    assert TRAINED_WINDOW * 3 / 4 <= window <= TRAINED_WINDOW * 3 / 2


def test_choice_keeps_to_the_budget(found: dict[str, Any]) -> None:
    choice, full = found["arms"]["the choice"], found["arms"]["full attention"]
    assert choice["num_bytes"] <= 0.4 * full["num_bytes"]
    assert choice["running"] > full["running"]


def test_what_chooses_is_never_what_reports(found: dict[str, Any], journal: Path) -> None:
    held_out = set(found["held_out"])
    assert held_out.isdisjoint(found["choosing"])
    assert len(held_out) == NUM_REQUESTS // 2
    asked: dict[str, set[int]] = {}
    for line in journal.read_text().splitlines()[1:]:
        record = json.loads(line)
        asked.setdefault(json.dumps([record["window"], record["full_layers"]]), set()).add(
            record["line"]
        )
    # Full attention, choice and runner-up alone saw what reports, once they were chosen.
    assert sum(bool(lines & held_out) for lines in asked.values()) == 3
    assert len(asked) > 5
    ends = [json.loads(line)["line"] for line in journal.read_text().splitlines()[1:]]
    first = min(index for index, line in enumerate(ends) if line in held_out)
    assert set(ends[first:]) == held_out


def test_printed_options_give_the_reported_figures_again(
    found: dict[str, Any], traffic: Path
) -> None:
    """An engine for itself, and Hugging Face's full attention, which knows nothing of engines."""
    tokenizer = AutoTokenizer.from_pretrained(SLIDING)
    full = Qwen3ForCausalLM.from_pretrained(
        SLIDING, dtype=torch.float32, layer_types=["full_attention"] * 4
    ).eval()
    options = found["additional_config"]["swa"]
    lines, rises, agree = traffic.read_text().splitlines(), list[float](), list[bool]()
    num_tokens = 0
    with ScoringEngine.start(Setup(str(SLIDING), 400, "float32", 512, 32), options) as engine:
        for number in found["held_out"]:
            record = json.loads(lines[number - 1])
            prompt, answer = (
                tokenizer(record[key], add_special_tokens=False)["input_ids"]
                for key in ("prompt", "answer")
            )
            scored = engine.score(prompt + answer)
            with torch.inference_mode():
                logits = full(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = logits.double().log_softmax(-1)
            losses = expected.gather(1, torch.tensor(answer)[:, None])
            rises.append(float(losses.sum()) - sum(scored.logprobs[-len(answer) :]))
            liked = scored.greedy[-len(answer) :]
            agree += [ours == hf for ours, hf in zip(liked, expected.argmax(-1), strict=True)]
            num_tokens += len(answer)
    choice = found["arms"]["the choice"]
    assert math.fsum(rises) / num_tokens == pytest.approx(choice["rise"]["mean"], abs=1e-4)
    assert sum(map(bool, agree)) / num_tokens == pytest.approx(choice["same_tokens"], abs=2e-3)


def test_run_that_was_cut_off_goes_on(
    swa: Run, found: dict[str, Any], journal: Path, traffic: Path
) -> None:
    """The last score is written again, and no other is measured."""
    whole = journal.read_text()
    journal.write_text(whole[:-20])
    done, again = tune(swa, traffic, *BUDGET, "--resume", str(journal))
    assert (done.returncode, journal.read_text()) == (0, whole)
    assert again["arms"] == found["arms"]
    assert done.stderr.count("requests ...") == 2  # one score, and attention mass


def test_nothing_within_tolerance_is_full_attention(swa: Run, tmp_path: Path) -> None:
    """To a model that was not trained a window is noise, for which no tolerance is left."""
    model = tmp_path / "model"
    shutil.copytree(SLIDING, model)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config.from_pretrained(SLIDING)).save_pretrained(model)
    shutil.copy(SLIDING / "config.json", model)
    traffic = write_traffic(tmp_path / "traffic.jsonl", 32, 192, 4)
    in_answers = ["--budget", "0.75", "--phase", "decode", "--tolerance", "0"]
    done, figures = tune(swa, traffic, *in_answers, model=model)
    assert done.returncode == 3
    assert figures["additional_config"] == {"swa": {"enabled": False}}
    assert not figures["is_tolerable"]
    assert "serve full attention, or give a greater --tolerance" in done.stdout
    # What was tried has the window in answers alone, and these were decoded.
    tried, full = (figures["arms"][name] for name in ("the choice", "full attention"))
    assert tried["additional_config"]["swa"]["phase"] == "decode"
    assert tried["num_bytes"] <= 0.75 * full["num_bytes"]
    assert tried["first_token"] == 1
    assert "an answer of full attention, decoded" in done.stderr


def test_attention_mass_is_that_of_eager_attention(no_engine: Callable[[], None]) -> None:
    """Of Hugging Face's weights; the text is computed in two chunks.

    With a window in answers only the prompt stays; with one in prompts only their queries count.
    """
    no_engine()
    tokens = tuple(text_tokens()[:100])
    request, setup = Request(1, tokens[:41], tokens[41:]), Setup(str(SLIDING), 128, "float32", 64)
    hf = Qwen3ForCausalLM.from_pretrained(
        SLIDING,
        dtype=torch.float32,
        layer_types=["full_attention"] * 4,
        attn_implementation="eager",
    )
    with torch.inference_mode():
        weights = hf.eval()(torch.tensor([tokens]), output_attentions=True).attentions
    windows = [(16, 0), (16, 4), (99, 0)]
    with Measurements(setup, Journal(None, {})) as measured:
        masses = measured.mass(
            [request], [(*window, phase) for window in windows for phase in Phase]
        )
    query, key = torch.arange(100)[:, None], torch.arange(100)[None]
    queries = {Phase.BOTH: slice(40, None), Phase.DECODE: slice(40, None), Phase.PREFILL: slice(41)}
    for (window, sinks, phase), mass in masses.items():
        hidden = (query - key >= window) & (key >= (41 if phase is Phase.DECODE else sinks))
        lost = [(layer[0].mean(0) * hidden)[queries[phase]].sum(1) for layer in weights]
        assert mass == pytest.approx([float(each.mean()) for each in lost], abs=1e-5)
    assert len(masses) == 9


TWO_WINDOWS = (16, 48, 0, 48)


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(48, 4, (2,), by_layer=TWO_WINDOWS),
        Candidate(24, 4, (1,), Phase.PREFILL),
        Candidate(24, 0, (1,), Phase.DECODE),
        Candidate(48, 0, (2,), Phase.DECODE, TWO_WINDOWS),
    ],
    ids=["two windows", "prefill", "decode", "two windows, decode"],
)
def test_answers_are_scored_as_they_are_served(
    candidate: Candidate, no_engine: Callable[[], None]
) -> None:
    """By the definition of a phase, in a dense model."""
    no_engine()
    tokens, num_prompt = tuple(text_tokens()[:150]), 90
    request = Request(1, tokens[:num_prompt], tokens[num_prompt:])
    sight = Sight(
        candidate.windows(4), candidate.sinks, phase=candidate.phase, prompt_len=num_prompt
    )
    dense = DenseText(SLIDING, torch.float32)
    scores = dense.scores(tokens, range(150), sight)[num_prompt - 1 : -1]
    loss = -float(scores.gather(1, torch.tensor(request.answer)[:, None]).sum())
    arguments = {"logits_processors": [ForcedTokens]}
    setup = Setup(str(SLIDING), 160, "float32", 64, 32, arguments)
    with Measurements(setup, Journal(None, {})) as measured:
        (score,) = measured.scores(candidate, [request])
    assert score.loss == pytest.approx(loss, abs=1e-3)
    liked = [ours == best for ours, best in zip(score.greedy, scores.argmax(-1), strict=True)]
    assert sum(map(bool, liked)) >= len(liked) - 1


def test_no_time_is_an_error(
    traffic: Path, no_engine: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    no_engine()
    command = ["tune", str(SLIDING), "--requests", str(traffic), *SIZES, *BUDGET]
    assert main([*command, "--time", "1s"]) == 1
    assert "--time leaves 0 s to choose in" in capsys.readouterr().err


def test_a_window_forgets_what_full_attention_recalls(demo_model: dict[str, Path]) -> None:
    """Two numbers stand in the window, and two further back."""
    model = str(demo_model["full"])
    tokenizer = tokenizer_of(model)
    needles = make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), [256], 2, 2
    )
    with Measurements(Setup(model, 300, "bfloat16", 512, 32), Journal(None, {})) as measured:
        assert measured.recalled(FULL, needles, tokenizer) == 4
        assert measured.recalled(Candidate(64, 4), needles, tokenizer) == 2
