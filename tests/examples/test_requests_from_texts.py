"""Requests cut from texts: `swa tune` reads them, and no token is lost or told twice."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import requests_from_texts
from swa_vllm.tools.tune.requests import FEWEST, read_requests, split_requests
from tests.helpers.paths import DATA

MODEL = DATA / "tiny-swa-sliding"
TEXTS = [DATA / "acts-1-7.txt", DATA / "openings.txt"]
PROMPT, ANSWER = 96, 160


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run_script(*arguments: object) -> Path:
        out = tmp_path / "traffic.jsonl"
        command = ["requests_from_texts.py", MODEL, out, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        requests_from_texts.main()
        return out

    return run_script


def test_requests_are_pieces_of_the_texts(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(*TEXTS, "--prompt", PROMPT, "--answer", ANSWER)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = [
        tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        for text in TEXTS
    ]
    pieces = [
        tuple(part[first : first + PROMPT + ANSWER])
        for part in tokens
        for first in range(0, len(part) - PROMPT - ANSWER + 1, PROMPT + ANSWER)
    ]
    requests = read_requests(path, tokenizer, 512)
    assert capsys.readouterr().out == f"{path}: {len(pieces)} requests of 96 + 160 tokens\n"
    assert len(requests) == len(pieces) > 40
    # A text that begins in a word's middle is not always cut into tokens as it was.
    assert sum(r.tokens == piece for r, piece in zip(requests, pieces, strict=True)) > 30
    texts = [tokenizer.decode(request.tokens) for request in requests]
    assert texts == [tokenizer.decode(piece) for piece in pieces]
    assert all(abs(len(request.prompt) - PROMPT) < 4 for request in requests)
    assert len(split_requests(requests, 0).held_out) == len(pieces) // 2


def test_too_little_text_is_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(TEXTS[0], "--prompt", 2000, "--answer", 2000)
    assert "make 2 requests of 2000 + 2000 tokens" in (error := capsys.readouterr().err)
    assert f"takes {FEWEST} at least; give more text" in error
    assert requests_from_texts.FEWEST == FEWEST
    with pytest.raises(SystemExit):
        run(TEXTS[0], "--prompt", 0)
    assert "must be at least 1 token, got 0 and 512" in capsys.readouterr().err
