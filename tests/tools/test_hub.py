"""Models named as on the Hugging Face hub: found in a cache, or told how to get there."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import try_to_load_from_cache

from swa_vllm.tools.bench.serving.checkpoints import prepare_checkpoints
from swa_vllm.tools.check.files import inspect_files
from swa_vllm.tools.check.problems import ProblemError
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.hub import find_model, hub_cache
from swa_vllm.tools.engines import setup
from swa_vllm.tools.engines.scoring import ScoringEngine
from tests.helpers.paths import DATA

NAME = "owner/a-Qwen3.5"
Cached = Callable[..., Path]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Puts files of a tiny model into a cache, as huggingface_hub lays it out."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def put(*files: str) -> Path:
        directory = tmp_path / "hub" / "models--owner--a-Qwen3.5"
        snapshot = directory / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (directory / "refs").mkdir()
        (directory / "refs" / "main").write_text("0123abcd")
        for file in files:
            shutil.copy(DATA / "tiny-swa-sliding" / file, snapshot)
        found = try_to_load_from_cache(NAME, files[0], cache_dir=hub_cache())
        assert found == str(snapshot / files[0])
        return snapshot

    return put


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_cache_by_environment(
    variables: dict[str, str], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(hub_cache()) == cache


def test_plan_and_check_take_a_cached_name(cached: Cached, tmp_path: Path) -> None:
    """And say the same of it as of its directory."""
    snapshot = cached("config.json")
    plans: list[dict[str, Any]] = []
    for model in (NAME, str(snapshot)):
        path = tmp_path / "plan.json"
        assert main(["plan", model, "--output", "64", "--json", str(path)]) == 0
        plans.append(json.loads(path.read_text()) | {"model": "the same"})
    assert plans[0] == plans[1]
    assert inspect_files(NAME, {}) == inspect_files(str(snapshot), {})
    assert main(["check", NAME]) == 0


def test_a_name_that_is_not_cached(
    cached: Cached, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Plan and check say the same: the command to run."""
    assert main(["plan", NAME]) == 1
    error = capsys.readouterr().err
    assert f"the Hugging Face cache {tmp_path}/hub has no config.json of it" in error
    assert f"run hf download {NAME} config.json\n" in error
    with pytest.raises(ProblemError) as caught:
        inspect_files(NAME, {})
    assert error == f"error: {caught.value}; {caught.value.remedy}\n"


def test_the_whole_model_where_it_is_needed(cached: Cached, tmp_path: Path) -> None:
    snapshot = cached("config.json")
    with pytest.raises(ValueError, match=rf"no weights of it; run hf download {re.escape(NAME)}$"):
        prepare_checkpoints(Path(NAME), tmp_path, 16, 64, seed=0)
    shutil.copy(DATA / "tiny-swa-sliding" / "model.safetensors", snapshot)
    made = prepare_checkpoints(Path(NAME), tmp_path, 16, 64, seed=0)
    assert (made[True] / "model.safetensors").resolve() == snapshot / "model.safetensors"


def test_engines_that_score_name_the_command_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError("offline")

    monkeypatch.setattr(setup.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=rf"or run hf download {re.escape(NAME)} \(offline\)$"):
        setup.scoring_text_config(NAME)
    with pytest.raises(ValueError, match=r"give a directory \(offline\)$"):
        setup.scoring_text_config("./nowhere")


def test_tune_takes_a_cached_name(
    cached: Cached,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its engines are given the directory, and its figures have the name."""
    snapshot = cached("config.json", "generation_config.json")
    requests = tmp_path / "requests.jsonl"
    lines = [
        {"prompt": f"{n} loaves and fishes " * 20, "answer": " they took up"} for n in range(4)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["tune", NAME, "--requests", str(requests), "--budget", "0.9", "--block-size", "16"]
    assert main(command) == 1
    assert f"no weights of it; run hf download {NAME}\n" in capsys.readouterr().err
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tiny-swa-sliding" / file, snapshot)

    def start(setup: Any, options: Any) -> Any:
        raise ValueError(f"an engine of {setup.model}")

    monkeypatch.setattr(ScoringEngine, "start", start)
    scores = tmp_path / "scores"
    assert main([*command, "--resume", str(scores)]) == 1
    assert capsys.readouterr().err.endswith(f"error: an engine of {snapshot}\n")
    assert json.loads(scores.read_text())["model"] == NAME


def test_a_directory_wins(cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("config.json")
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model(NAME) == Path(NAME)
