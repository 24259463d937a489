"""What is refused with a window, where no bad input of the tables tells."""

from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from swa_backend.options import SWAConfigError
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable, refuse_wrong_weights
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL


def _config(model: Path, **options: Any) -> VllmConfig:
    swa = {"window": 40, **options}
    return EngineArgs(
        str(model), dtype="float32", additional_config={"swa": swa}
    ).create_engine_config()


def _check(config: VllmConfig) -> None:
    check_servable(config, SWAConfig.from_vllm(config))


def test_sinks_that_are_not_shifted_may_be_more_than_heads_have_places(
    tiny_model: ModelFactory,
) -> None:
    _check(_config(tiny_model(**FULL), sink_tokens=250))
    with pytest.raises(ValueError, match="position_shift on CPUs allows at most"):
        _check(_config(tiny_model(**FULL), sink_tokens=250, position_shift=True))


def test_kernels_are_refused_on_devices_that_they_were_not_made_for(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_model(**FULL), impl="triton")
    _check(config)  # in the interpreter
    monkeypatch.setattr(current_platform, "device_type", "xpu")
    with pytest.raises(SWAConfigError, match="Triton kernels of windowed layers do not run here"):
        _check(config)


def test_weights_are_checked_where_they_are_local_and_loaded(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    config = _config(tiny_model(**FULL))
    refuse_wrong_weights(config)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    config.model_config.model = str(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        refuse_wrong_weights(config)
    config.load_config.load_format = "dummy"
    refuse_wrong_weights(config)
    config.load_config.load_format = "auto"
    config.model_config.model = "Qwen/Qwen3-8B"  # which vLLM downloads
    refuse_wrong_weights(config)
