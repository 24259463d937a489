"""What is refused with a window, where no bad input of the tables tells."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from swa_backend.options import SWAConfigError
from swa_vllm import refusals
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable, refuse_wrong_weights
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL


def _config(model: Path, arguments: Any = None, **options: Any) -> VllmConfig:
    swa = {"window": 40, **options}
    return EngineArgs(
        str(model), dtype="float32", additional_config={"swa": swa}, **(arguments or {})
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


@pytest.mark.parametrize("draft", ["Eagle3Qwen3vlForCausalLM", "PeagleQwen3ForCausalLM"])
def test_draft_that_was_not_tested_is_refused_by_name(draft: str, tiny_model: ModelFactory) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    config = _config(tiny_model(**FULL), {"speculative_config": ngram})
    assert config.speculative_config is not None
    config.speculative_config.method = "eagle3"
    _check(config)
    model_config = copy.copy(config.model_config)
    model_config.model_arch_config = replace(model_config.model_arch_config, architectures=[draft])
    config.speculative_config.draft_model_config = model_config
    with pytest.raises(SWAConfigError, match=f"the draft {draft} was not tested with windows"):
        _check(config)


def test_phase_is_refused_where_it_was_not_tested(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**FULL)
    config = _config(model, phase="prefill")
    _check(config)
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    drafted = _config(model, {"speculative_config": ngram}, phase="prefill")
    _check(drafted)
    assert drafted.speculative_config is not None
    drafted.speculative_config.method = "eagle3"
    with pytest.raises(SWAConfigError, match="by eagle3; use ngram or draft_model, or remove"):
        _check(drafted)
    with monkeypatch.context() as patch:
        patch.setattr(SWAConfig, "has_own_backend", False)
        with pytest.raises(SWAConfigError, match="platform does not use; remove phase"):
            _check(config)
    monkeypatch.setattr(ModelConfig, "architecture", "Qwen3VLForConditionalGeneration")
    only = "only with Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen3NextForCausalLM, .*; remove phase"
    with pytest.raises(SWAConfigError, match=only):
        _check(config)


def test_a_window_in_answers_only_is_refused_where_it_has_no_effect(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_model(**FULL), phase="decode")
    _check(config)
    monkeypatch.setattr(config.model_config, "runner_type", "pooling")
    with pytest.raises(SWAConfigError, match=r"a pooling model generates no tokens\. Remove phase"):
        _check(config)
    monkeypatch.undo()
    monkeypatch.setattr(config.cache_config, "cache_dtype", "fp8")
    with pytest.raises(
        SWAConfigError, match=r'phase="decode" cannot be had with .*fp8: .*--kv-cache-dtype'
    ):
        _check(config)
    refusals._refuse_phase(config, SWAConfig.from_vllm(_with_kernels(config)))  # which know fp8
    monkeypatch.undo()
    monkeypatch.setattr(config.scheduler_config, "disable_hybrid_kv_cache_manager", True)
    with pytest.raises(SWAConfigError, match="leaves pages to vLLM; remove either"):
        _check(config)


def test_backends_that_a_phase_cannot_have_beside_it_are_refused(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ours in full layers too, vLLM makes one builder for layers with and without a window."""
    config = _config(tiny_model(**FULL), phase="prefill")
    attention = config.attention_config
    attention.backend = AttentionBackendEnum.FLASHINFER
    _check(config)  # which vLLM ignores on CPUs
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(SWAConfigError, match=r"FLASHINFER and Model Runner V1, .*use one of these"):
        refusals._refuse_phase(config, SWAConfig.from_vllm(_with_kernels(config)))
    attention.backend = AttentionBackendEnum.TRITON_ATTN
    refusals._refuse_phase(config, SWAConfig.from_vllm(_with_kernels(config)))
    attention.backend_per_kind = {"full_attention": AttentionBackendEnum.CUSTOM}
    with pytest.raises(
        SWAConfigError, match=r"--attention-backend CUSTOM gives them .*leave it out"
    ):
        refusals._refuse_phase(config, SWAConfig.from_vllm(_with_kernels(config)))


def _with_kernels(config: VllmConfig) -> VllmConfig:
    """The config of a platform that has this project's kernels."""
    config.additional_config = {"swa": {**config.additional_config["swa"], "impl": "triton"}}
    return config


def test_lengths_of_prompts_are_asked_for_with_a_phase(tiny_model: ModelFactory) -> None:
    """By a window of another kind, which full layers apply: so none that a text outgrows."""
    model = tiny_model(**FULL)
    assert _config(model).model_config.rswa_window is None
    config = _config(model, phase="prefill").model_config
    assert config.rswa_window is not None
    assert config.rswa_window >= config.max_model_len
    assert config.get_model_arch_config().rswa_window == config.rswa_window
