"""An override of RoPE that loses the checkpoint's theta is warned of, and what to write works."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swa_vllm import config_hook
from swa_vllm.tools.check import device
from swa_vllm.tools.cli import main
from tests.helpers.engines import EngineFactory, ModelFactory
from tests.helpers.tiny_models import SLIDING, save_tiny_model, save_tiny_moe

# What operators of Qwen3 write for long texts. Engines get copies: vLLM adds a theta to them.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
THETA = 5_000_000.0
WRITE = re.compile(r"Write --hf-overrides '(\{.*\})'")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the config hook warns of."""
    said: list[str] = []
    monkeypatch.setattr(
        config_hook.logger, "warning", lambda text, *parts: said.append(text % parts)
    )
    return said


def _served_thetas(llm: Any) -> set[float]:
    (thetas,) = llm.apply_model(
        lambda model: {layer.self_attn.rotary_emb.base for layer in model.model.layers}
    )
    return set(thetas)


@pytest.mark.parametrize(
    ("save", "key", "instead"),
    [
        (save_tiny_model, "rope_parameters", 1_000_000),
        (save_tiny_moe, "rope_parameters", 10_000),
        (save_tiny_model, "rope_scaling", 1_000_000),
    ],
    ids=["dense", "moe", "older key"],
)
def test_a_lost_theta_is_told_and_the_override_to_write_has_it(
    save: Callable[..., Path],
    key: str,
    instead: float,
    tmp_path: Path,
    engine: EngineFactory,
    warnings: list[str],
) -> None:
    rope = {"rope_type": "default", "rope_theta": THETA}
    model = save(tmp_path, **SLIDING, rope_parameters=rope)
    llm = engine(model, hf_overrides={key: dict(YARN)})
    assert _served_thetas(llm) == {instead}  # as stock vLLM: it is warned of, and left alone
    (warning,) = warnings
    assert f"the checkpoint has rope_theta=5e+06, and {instead:g} is served" in warning
    written = WRITE.search(warning)
    assert written is not None
    warnings.clear()
    assert _served_thetas(engine(model, hf_overrides=json.loads(written[1]))) == {THETA}
    assert not warnings


def test_a_theta_that_stays_is_not_warned_of(
    tiny_model: ModelFactory, engine: EngineFactory, warnings: list[str]
) -> None:
    """As of most Qwen3, whose theta is what vLLM takes where there is none."""
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    model = tiny_model(**SLIDING, rope_parameters=rope)
    assert _served_thetas(engine(model, hf_overrides={"rope_parameters": dict(YARN)})) == {
        1_000_000
    }
    assert not warnings


def test_swa_check_takes_overrides_and_tells_it_too(
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step in ("inspect_kernels", "inspect_cpu_operators"):
        monkeypatch.setattr(device, step, lambda *_: "not asked in this test")
    rope = {"rope_type": "default", "rope_theta": THETA}
    model: Path = tiny_model(**SLIDING, rope_parameters=rope)
    overrides = json.dumps({"rope_parameters": YARN})
    assert main(["check", str(model), "--hf-overrides", overrides]) == 0
    written = WRITE.search(capsys.readouterr().out)
    assert written is not None
    assert main(["check", str(model), "--hf-overrides", written[1]]) == 0
    assert "warning" not in capsys.readouterr().out
