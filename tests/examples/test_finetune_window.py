"""The fine-tuning example: trains under the window's mask, and writes a checkpoint that slides."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

import finetune_window
from finetune_window import LENGTH_IN_WINDOWS, finetune, lr_factor
from swa_backend.layers import resolve_layers
from swa_backend.options import SWAOptions
from swa_vllm.tools.engines.texts import tokens_of
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.paths import DATA

MODEL, TEXT = DATA / "tiny-swa-mixed", DATA / "acts-1-7.txt"
WINDOW, STEPS = 32, 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out_dir = tmp_path_factory.mktemp("finetuned") / "model"
    text = TEXT.read_text(encoding="utf-8")
    return out_dir, finetune(MODEL, text, out_dir, window=WINDOW, steps=STEPS)


def test_first_loss_is_that_of_a_dense_model_with_the_window(
    result: tuple[Path, list[float]],
) -> None:
    """Half of this model's layers were full before."""
    tokens, length = tokens_of(str(MODEL), TEXT), LENGTH_IN_WINDOWS * WINDOW
    torch.manual_seed(0)
    first = int(torch.randint(len(tokens) - length + 1, ()))
    dense = DenseText(MODEL, torch.float32)
    logprobs = dense.logprobs(tokens[first : first + length], range(length), Sight((WINDOW,) * 4))
    assert len(result[1]) == STEPS
    assert result[1][0] == pytest.approx(-logprobs.mean().item(), rel=1e-5)


def test_attention_and_norms_are_trained_and_nothing_else(
    result: tuple[Path, list[float]],
) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (MODEL, result[0]))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("self_attn", "norm")
    assert all(any(kind in name for kind in kinds) for name in changed)
    assert {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)} <= changed
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_checkpoint_slides_by_its_own_config(result: tuple[Path, list[float]]) -> None:
    config = Qwen3Config.from_pretrained(result[0])
    assert resolve_layers(config, SWAOptions()).windows == (WINDOW,) * 4
    assert (result[0] / "tokenizer.json").is_file()


def test_learning_rate_rises_and_falls() -> None:
    factors = [lr_factor(step, 60) for step in range(60)]
    highest = factors.index(max(factors))
    assert factors[: highest + 1] == sorted(factors[: highest + 1])
    assert factors[highest:] == sorted(factors[highest:], reverse=True)
    assert 0 < factors[-1] < 0.02


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune_window.py", *map(str, arguments)])
    finetune_window.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0"], "window must be 1 to 128 tokens, got 0"),
        (["--window", "129"], "window must be 1 to 128 tokens, got 129"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _main(monkeypatch, MODEL, TEXT, tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err


def test_what_is_no_qwen3_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no config\.json"):
        finetune(tmp_path, "", tmp_path / "out", window=WINDOW, steps=1)
    config = json.loads((MODEL / "config.json").read_text()) | {"model_type": "qwen3_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a qwen3_moe; this example trains qwen3 only"):
        finetune(tmp_path, "", tmp_path / "out", window=WINDOW, steps=1)


def test_a_text_shorter_than_an_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens; a training example needs 128"):
        finetune(MODEL, "In the beginning", tmp_path / "out", window=WINDOW, steps=1)


def test_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MODEL, tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        _main(monkeypatch, MODEL, TEXT, tmp_path / "out")
    assert "exists; remove it or name another directory" in capsys.readouterr().err
