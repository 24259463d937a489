"""Random plans beside the one that `swa tune` chose: their bytes, their losses, the figures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import random_plans as tool
from random_plans import DenseModel, candidate_of
from swa_vllm.tools.common.pools import Model
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits
from swa_vllm.tools.engines.setup import scoring_text_config
from swa_vllm.tools.tune.candidates import Candidate
from swa_vllm.tools.tune.requests import Request, read_requests, split_requests
from swa_vllm.tools.tune.sizes import Shape, Sizer
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.trained_models import SLIDING, TEXT, text_tokens

OPTIONS = {"window": {"0,2": 64, "3": 96}, "sink_tokens": 4}


def test_masks_are_what_a_plan_sees() -> None:
    tokens = tuple(text_tokens()[:200])
    request = Request(1, tokens[:80], tokens[80:])
    plan = candidate_of(OPTIONS, scoring_text_config(str(SLIDING)))
    assert plan == Candidate(96, 4, by_layer=(64, 0, 64, 96))
    seen = Sight((64, None, 64, 96), 4)
    expected = DenseText(SLIDING, torch.float32).logprobs(tokens, range(200), seen)[79:]
    assert DenseModel(str(SLIDING), "float32").loss(plan, request) == pytest.approx(
        -float(expected.sum()), rel=1e-4
    )


def test_options_without_a_plan_are_refused() -> None:
    for options in ({"enabled": False}, {"window": 64, "phase": "decode"}):
        with pytest.raises(ValueError, match="so there is nothing to compare"):
            candidate_of(options, scoring_text_config(str(SLIDING)))


def test_plans_fill_the_budget() -> None:
    model = Model((None,) * 8, 0, kv_heads=3, head_dim=128, number_bytes=4)
    limits = Limits(32, 800, 8192, 256, 1)
    sizer = Sizer(model, Shape(1, 9), limits, Workload(512, 255), Device.CPU)
    limit = sizer.num_bytes(Candidate()) // 2
    plans = tool.random_plans(sizer, 4, limit, 30, seed=0)
    assert len({*plans}) == 30
    assert {len(plan.full_layers) for plan in plans} >= {1, 2, 3}
    for plan in plans:
        assert plan.window is not None
        wider = Candidate(plan.window + 32, 4, plan.full_layers)
        assert sizer.num_bytes(plan) <= limit < sizer.num_bytes(wider)
    assert plans == tool.random_plans(sizer, 4, limit, 30, seed=0)
    with pytest.raises(ValueError, match="ask for fewer --plans"):
        tool.random_plans(sizer, 4, limit, 10**4, seed=0)


def test_figures_say_how_many_are_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, tuned, out = (tmp_path / name for name in ("requests", "tuned", "out"))
    text = TEXT.read_text()
    pieces = [text[at : at + 900] for at in range(0, 5400, 900)]
    lines = [json.dumps({"prompt": piece[:500], "answer": piece[500:]}) for piece in pieces]
    requests.write_text("\n".join(lines))
    read = read_requests(requests, AutoTokenizer.from_pretrained(SLIDING), 512)
    arm = {"additional_config": {"swa": {"window": 64}}, "rise": None}
    figures = {
        "seed": 1,
        "budget": 0.6,
        "held_out": [request.line for request in split_requests(read, 1).held_out],
        "arms": {tool.CHOICE: arm},
    }
    tuned.write_text(json.dumps(figures))
    plot = tmp_path / "plans.png"
    sizes = ["--block-size", "32", "--plans", "4", "--best", "2", "--others", "2"]
    command = [SLIDING, requests, tuned, *sizes, "--json", out, "--plot", plot]
    monkeypatch.setattr(sys, "argv", ["random_plans.py", *map(str, command)])
    tool.main()
    found = json.loads(out.read_text())
    rises = [plan["rise_on_first"] for plan in found["random"]]
    assert rises == sorted(rises)
    assert found["num_better"] == sum(r < found["choice"]["rise_on_first"] for r in rises)
    assert [plan["rise_on_others"] is None for plan in found["random"]] == [False] * 2 + [True] * 2
    assert found["tuned"] == figures["arms"]
    assert [found["first"], *found["others"]] == figures["held_out"]
    assert f"{found['num_better']} of 4 random plans" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    tuned.write_text(json.dumps(figures | {"held_out": [1]}))
    with pytest.raises(SystemExit, match="is of other requests"):
        tool.main()
