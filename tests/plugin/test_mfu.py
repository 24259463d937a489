"""vLLM's FLOPs metrics know the checkpoint's windows only; whoever asks for them is told."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.perf import ModelMetrics

from swa_backend.window import Phase
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.metrics.mfu import wrong_flops
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL, MIXED, NUM_LAYERS, SLIDING, WINDOW

FLAG = {"enable_mfu_metrics": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "full": (FULL, {}, None),
    "sliding": (SLIDING, {}, None),
    "mixed": (MIXED, {}, None),
    "the same window as option": (SLIDING, {"window": WINDOW}, None),
    "window by option": (FULL, {"window": 8}, "no windows, and served are 4 layers with a"),
    "another window": (MIXED, {"window": 8}, "2 layers with a window of 40, and served are 2"),
    "other layers": (SLIDING, {"full_attention_layers": "0"}, "4 layers with a window of 40"),
    "in the prompt only": (
        SLIDING,
        {"phase": "prefill"},
        "4 layers with a window of 40, and served are 4 layers with a window of 40 in the prompt",
    ),
    "switched off": (SLIDING, {"enabled": False}, "of 40, and served are no windows"),
}


def _counted(metrics: ModelMetrics) -> Iterator[tuple[int | None, int]]:
    for metric in metrics.metrics:
        if hasattr(metric, "num_swa_layers"):
            yield metric.sliding_window, metric.num_swa_layers


@pytest.mark.parametrize("name", CASES)
def test_whoever_asks_is_told_what_is_wrong(name: str, tiny_model: ModelFactory) -> None:
    checkpoint, options, message = CASES[name]
    arguments = {"skip_tokenizer_init": True, "additional_config": {"swa": options}}
    model = str(tiny_model(**checkpoint))
    config = EngineArgs(model, **arguments, **FLAG).create_engine_config()
    swa = SWAConfig.from_vllm(config)
    layers, phase = swa.layers, swa.options.phase
    said = wrong_flops(config, layers, phase)
    assert (said is None) if message is None else (said is not None and message in said)
    # vLLM's metrics themselves: the message is about what they count.
    windows = {window for window in layers.windows if window is not None}
    served = (windows.pop() if windows else None, sum(w is not None for w in layers.windows))
    (counted,) = set(_counted(ModelMetrics(config)))
    assert (counted == served and phase is Phase.BOTH) is (message is None)
    silent = EngineArgs(model, **arguments).create_engine_config()
    assert wrong_flops(silent, layers, phase) is None


def test_start_up_warns(tiny_model: ModelFactory, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        EngineArgs(
            str(tiny_model(**FULL)),
            skip_tokenizer_init=True,
            additional_config={"swa": {"window": NUM_LAYERS}},
            **FLAG,
        ).create_engine_config()
    finally:
        logger.removeHandler(caplog.handler)
    assert any("--enable-mfu-metrics reads the checkpoint" in m for m in caplog.messages)
