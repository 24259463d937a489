"""Options of windows with models that get none: an error at start, on every path."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, EngineArgs, ModelRegistry
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import llama
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.utils.argparse_utils import FlexibleArgumentParser

import swa_vllm
from swa_vllm.compat import architectures
from swa_vllm.tools.check.files import inspect_files
from swa_vllm.tools.check.steps import ProblemError, inspect_model
from tests.helpers.engines import ModelFactory, resolve_here
from tests.helpers.ray_cluster import config_on_ray
from tests.helpers.tiny_models import FULL, SLIDING

SWA = {"swa": {"window": 40}}
KEYS = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Without an entry in vLLM's map of hooks, and with one.
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **KEYS}
REWARD = {"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"], **KEYS}
GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **KEYS}
MAMBA = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **KEYS}
MAX_MODEL_LEN = 256
ConfigDirectory = Callable[..., Path]


@pytest.fixture
def directory(tmp_path: Path) -> ConfigDirectory:
    """A directory with a config.json of the given keys, and nothing else."""
    swa_vllm.register()

    def make(keys: dict[str, Any], **others: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**keys, **others}))
        for architecture in {**keys, **others}["architectures"]:
            if architecture in ModelRegistry.models:
                resolve_here(architecture)
        return tmp_path

    return make


def _config(model: Path, options: Any = None, **kwargs: Any) -> VllmConfig:
    return EngineArgs(
        str(model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        additional_config={} if options is None else options,
        **kwargs,
    ).create_engine_config()


def _by_command(model: Path, options: dict[str, Any]) -> VllmConfig:
    """What ``vllm serve`` does with its arguments."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--dtype", "float32", "--additional-config", json.dumps(options)]
    args = parser.parse_args(["--model", str(model), *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def _by_llm(model: Path, options: dict[str, Any]) -> LLM:
    return LLM(str(model), dtype="float32", skip_tokenizer_init=True, additional_config=options)


def _on_ray(model: Path, options: dict[str, Any]) -> VllmConfig:
    return config_on_ray(model, dtype="float32", additional_config=options)


@pytest.mark.parametrize("start", [_config, _by_command, _by_llm, _on_ray])
def test_every_path_refuses_options_that_nobody_reads(
    start: Callable[[Path, dict[str, Any]], Any], directory: ConfigDirectory
) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not served") as caught:
        start(directory(LLAMA), SWA)
    assert ", ".join((*architectures.PLAIN, *architectures.WINDOWED)) in str(caught.value)
    assert "Serve one of these, or remove 'swa'" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"swa": {"enabled": False}},
        {"swa": {"no such key": 1}},
        {"swa": None},
        {"SWA": {"window": 8}},
    ],
    ids=["disabled", "unknown", "null", "capitals"],
)
def test_any_option_is_refused(options: dict[str, Any], directory: ConfigDirectory) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not served with windows"):
        _config(directory(LLAMA), options)


@pytest.mark.parametrize(
    "options", [{}, {"swa": {}}, {"window": 8}], ids=["none", "empty", "another plugin's"]
)
def test_other_models_are_served_without_options(
    options: dict[str, Any], directory: ConfigDirectory
) -> None:
    assert _config(directory(LLAMA), options).model_config.architecture == "LlamaForCausalLM"


def test_hooks_of_vllms_own_run_too(directory: ConfigDirectory) -> None:
    """Of a model's config, and of an engine's: a static method here, a class method there."""
    pooler = _config(directory(REWARD)).model_config.pooler_config
    assert pooler is not None
    assert pooler.use_activation is False
    assert _config(directory(GPT_OSS)).structured_outputs_config.reasoning_parser == "openai_gptoss"
    assert _config(directory(MAMBA)).cache_config.mamba_block_size == MAX_MODEL_LEN


@pytest.mark.parametrize("keys", [REWARD, GPT_OSS, MAMBA], ids=lambda keys: keys["model_type"])
def test_models_with_a_hook_of_vllms_own_refuse_options(
    keys: dict[str, Any], directory: ConfigDirectory
) -> None:
    with pytest.raises(ValueError, match=f"{keys['architectures'][0]} is not served with windows"):
        _config(directory(keys), SWA)


def test_transformers_backend_refuses_options(
    directory: ConfigDirectory, tiny_model: ModelFactory
) -> None:
    resolve_here("TransformersForCausalLM")
    config = _config(tiny_model(**SLIDING), model_impl="transformers")
    assert config.model_config.architecture == "TransformersForCausalLM"
    with pytest.raises(
        ValueError,
        match=r"model-impl transformers serves Qwen3ForCausalLM as vLLM's TransformersForCausalLM, "
        "which ignores it. Leave --model-impl out",
    ):
        _config(tiny_model(**FULL), SWA, model_impl="transformers")
    with pytest.raises(ValueError, match="TransformersForCausalLM is not served with windows"):
        _config(directory(LLAMA), SWA, model_impl="transformers")


def test_other_names_of_an_architecture_are_refused_too(directory: ConfigDirectory) -> None:
    """vLLM finds the hook of a classifier by the name of the model that it converts."""
    resolve_here("LlamaForCausalLM")
    model = directory(LLAMA, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is not served"):
        _config(model, SWA)


def test_classifiers_of_served_models_keep_vllms_hook(
    tiny_model: ModelFactory,
) -> None:
    swa_vllm.register()
    hook = MODELS_CONFIG_MAP["Qwen3ForSequenceClassification"]
    assert hook.__module__.startswith("vllm.")


def test_draft_is_not_refused_for_its_targets_options(
    directory: ConfigDirectory, tiny_model: ModelFactory
) -> None:
    """vLLM runs the hook of some drafts with a config that has the target's options."""
    resolve_here("Qwen3ForCausalLM")
    model = directory(LLAMA)
    draft = {"model": str(model), "method": "draft_model", "num_speculative_tokens": 2}
    config = _config(tiny_model(**SLIDING), {"swa": {"enabled": False}}, speculative_config=draft)
    assert config.speculative_config is not None
    drafting = config.speculative_config.draft_model_config
    assert drafting.architecture == "LlamaForCausalLM"
    assert not drafting.config_updated
    VllmConfig(model_config=drafting, additional_config=SWA)
    assert drafting.config_updated


def test_every_architecture_has_a_hook(clean_registries: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    swa_vllm.register()
    assert time.perf_counter() - started < 1
    served = {*architectures.PLAIN, *architectures.WINDOWED}
    for architecture in ModelRegistry.models:
        hook = MODELS_CONFIG_MAP[architecture]
        assert hook.__module__ == "swa_vllm.config_hook", architecture
        assert (hook.__name__ != "RefusesWindows") == (architecture in served), architecture
    before = dict(MODELS_CONFIG_MAP)
    swa_vllm.register()
    assert before == MODELS_CONFIG_MAP


class OtherLlama(llama.LlamaForCausalLM):
    """The model of another plugin."""


def test_model_that_another_plugin_registered_is_refused(
    clean_registries: pytest.MonkeyPatch, directory: ConfigDirectory
) -> None:
    model = directory(LLAMA, architectures=["OtherLlama"])
    ModelRegistry.register_model("OtherLlama", OtherLlama)
    # Registered after this plugin: vLLM runs no hook, and the options are ignored.
    assert _config(model, SWA).model_config.architecture == "OtherLlama"
    # And before it:
    swa_vllm.register()
    with pytest.raises(ValueError, match="OtherLlama is not served with windows"):
        _config(model, SWA)


def test_swa_check_fails_where_no_hook_runs(
    clean_registries: pytest.MonkeyPatch, directory: ConfigDirectory
) -> None:
    ModelRegistry.register_model("OtherQwen3", OtherLlama)
    model = directory({**LLAMA, "model_type": "qwen3", "architectures": ["OtherQwen3"]})
    with pytest.raises(ProblemError, match="architectures OtherQwen3: not served with windows"):
        inspect_files(str(model), {"additional_config": SWA})
    with pytest.raises(ProblemError, match="OtherLlama, which knows nothing of windows"):
        inspect_model(str(model), {"additional_config": SWA})


def test_qwen3_that_another_plugin_registers_later_is_refused(
    clean_registries: pytest.MonkeyPatch, directory: ConfigDirectory, tiny_model: ModelFactory
) -> None:
    ModelRegistry.register_model("Qwen3ForCausalLM", OtherLlama)
    _config(tiny_model(**FULL))
    with pytest.raises(
        RuntimeError, match=r"is registered by .*:OtherLlama.*swa_vllm.models.qwen3.*Load only one"
    ):
        _config(tiny_model(**FULL), SWA)
