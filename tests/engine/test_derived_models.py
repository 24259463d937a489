"""Models that contain a Qwen3: served with windows exactly, or refused by name.

They are started for text only, so Hugging Face's plain Qwen3 with the same weights is the oracle.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model
from vllm import EngineArgs, ModelRegistry
from vllm.model_executor.model_loader.utils import initialize_model

import swa_vllm
from swa_backend.options import SWAConfigError
from swa_vllm.compat import architectures, versions
from swa_vllm.models import derived, guard
from tests.helpers.derived_models import KINDS, TEXT_ONLY, projection, save_derived
from tests.helpers.engines import ModelFactory, resolve_here
from tests.helpers.processes import Probe, probe_environment
from tests.helpers.tiny_models import (
    FULL,
    SLIDING,
    WINDOW,
    MoeOracle,
    Oracle,
    random_prompts,
    save_tiny_moe,
)
from tests.helpers.wheel_sources import torchvision_files

LENGTHS = (1, WINDOW + 1, 4 * WINDOW)
WINDOWS = (None, None, WINDOW, WINDOW)
BY_OPTIONS = {"swa": {"window": WINDOW, "full_attention_layers": "0-1"}}
BY_CHECKPOINT = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
}


@pytest.fixture(scope="session")
def torchvision() -> Path:
    """Python files of torchvision, whose operators do not load on a torch without CUDA.

    These models import it for image processing, which needs no operator.
    """
    return torchvision_files()


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random tiny Qwen3-MoE."""
    return save_tiny_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def served(
    torchvision: Path,
    tiny_model: ModelFactory,
    moe_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What the probe says, in a process that has torchvision, about the derived model of a name."""
    root = tmp_path_factory.mktemp("derived")
    probe = Probe("derived", probe_environment(str(torchvision)), root / "log")
    vision = "Qwen3VLForConditionalGeneration"
    disabled = {"additional_config": {"swa": {"enabled": False}}}
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        **{kind: (kind, {}, {"additional_config": BY_OPTIONS}) for kind in KINDS},
        "checkpoint": (vision, BY_CHECKPOINT, {}),
        "ambiguous": (vision, {"sliding_window": WINDOW}, {}),
        "disabled": (vision, BY_CHECKPOINT, disabled),
    }
    cases["ColQwen3"][2]["skip_tokenizer_init"] = False

    @cache
    def ask(name: str) -> dict[str, Any]:
        kind, text, kwargs = cases[name]
        plain = moe_model if "Moe" in kind else tiny_model(**FULL)
        model = save_derived(root / name, kind, plain, text)
        if name == "ambiguous":
            (model / "model.safetensors").unlink()
        return dict(probe.ask(str(model), {"limit_mm_per_prompt": TEXT_ONLY, **kwargs}))

    yield ask
    probe.stop()


def _check_exact(answers: list[Any], oracle: Oracle | MoeOracle) -> None:
    prompts = random_prompts(LENGTHS)
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        score = oracle.score(prompt + tokens)
        chosen = score.logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (torch.tensor(logprobs, dtype=torch.float64) - chosen).abs().max() <= score.noise


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ColQwen3"])
def test_text_stack_slides_as_the_plain_model_does(
    kind: str, served: Callable[[str], dict[str, Any]], tiny_model: ModelFactory, moe_model: Path
) -> None:
    said = served(kind)
    assert "error" not in said, said
    assert said["windows"] == list(WINDOWS)
    assert said["specs"] == ["FullAttentionSpec", "SWASpec"]
    oracle = (
        MoeOracle(moe_model, WINDOWS)
        if "Moe" in kind
        else Oracle(tiny_model(**FULL), **BY_CHECKPOINT)
    )
    _check_exact(said["answers"], oracle)


def test_text_config_of_the_checkpoint_decides(
    served: Callable[[str], dict[str, Any]], tiny_model: ModelFactory
) -> None:
    assert served("checkpoint")["windows"] == list(WINDOWS)
    _check_exact(served("checkpoint")["answers"], Oracle(tiny_model(**FULL), **BY_CHECKPOINT))
    assert served("disabled")["windows"] == [None] * 4
    _check_exact(served("disabled")["answers"], Oracle(tiny_model(**FULL)))


def test_window_that_transformers_ignores_is_refused_before_weights(
    served: Callable[[str], dict[str, Any]],
) -> None:
    assert (
        "sliding_window=40 without use_sliding_window is ambiguous"
        in (served("ambiguous")["error"])
    )


def test_late_interaction_embeddings_slide(
    served: Callable[[str], dict[str, Any]], tiny_model: ModelFactory
) -> None:
    assert served("ColQwen3")["windows"] == list(WINDOWS)
    model = tiny_model(**FULL)
    config = Qwen3Config.from_pretrained(model, **BY_CHECKPOINT)
    exact, rounded = (
        Qwen3Model.from_pretrained(model, config=config, dtype=dtype, attn_implementation="eager")
        for dtype in (torch.float64, torch.float32)
    )

    @torch.inference_mode()
    def embed(oracle: Qwen3Model, prompt: list[int]) -> torch.Tensor:
        hidden = oracle(torch.tensor([prompt])).last_hidden_state[0].double()
        return torch.nn.functional.normalize(hidden @ projection().double().T, dim=-1)

    prompts = random_prompts(LENGTHS)
    expected = [embed(exact, prompt) for prompt in prompts]
    noise = max((embed(rounded, p) - e).abs().max() for p, e in zip(prompts, expected, strict=True))
    for got, embedding in zip(served("ColQwen3")["embeddings"], expected, strict=True):
        assert (torch.tensor(got, dtype=torch.float64) - embedding).abs().max() <= noise


def _make(
    architecture: str, model: Path, options: dict[str, Any], prefix: str = "", **kwargs: Any
) -> None:
    """Make the class that vLLM has for ``architecture`` with the config of a plain Qwen3."""
    swa_vllm.register()
    try:
        model_class = ModelRegistry.models[architecture].load_model_cls()
    except ModuleNotFoundError as error:
        pytest.skip(f"vLLM's {architecture} needs {error.name}")
    resolve_here("Qwen3ForCausalLM")
    config = EngineArgs(
        str(model), skip_tokenizer_init=True, additional_config={"swa": options}, **kwargs
    ).create_engine_config()
    initialize_model(config, prefix=prefix, model_class=model_class)


@pytest.mark.parametrize("architecture", architectures.UNPROVEN)
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [(FULL, {"window": WINDOW}), (SLIDING, {}), (SLIDING, {"enabled": False})],
    ids=["options", "checkpoint", "disabled"],
)
def test_unproven_models_refuse_windows_before_weights(
    architecture: str, checkpoint: dict[str, Any], options: dict[str, Any], tiny_model: ModelFactory
) -> None:
    with pytest.raises(RuntimeError, match=r"asks for sliding windows: .* was not tested with"):
        _make(architecture, tiny_model(**checkpoint), options)


@pytest.mark.parametrize("architecture", architectures.PLAIN)
def test_part_of_another_model_refuses_windows_before_weights(
    architecture: str, tiny_model: ModelFactory
) -> None:
    with pytest.raises(SWAConfigError, match="the part 'language_model' of this model"):
        _make(architecture, tiny_model(**FULL), {"window": WINDOW}, prefix="language_model")


def test_unproven_models_are_stock_without_windows(tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="MiniCPMV only supports versions"):
        _make("MiniCPMV", tiny_model(**FULL), {}, hf_overrides={"version": 9.9})


def test_untested_vllm_refuses_windows_of_derived_models_too(
    clean_registries: pytest.MonkeyPatch, tiny_model: ModelFactory
) -> None:
    assert set(architectures.GUARDS) == set(architectures.MODELS)
    clean_registries.setattr(versions, "vllm_version", lambda: "0.99.0")
    with pytest.raises(RuntimeError, match=r"tested with vLLM 0.32 and 0.33"):
        _make("JinaForRanking", tiny_model(**FULL), {"window": WINDOW})


@pytest.mark.parametrize("module", [derived, guard])
def test_only_known_classes_are_made(module: Any) -> None:
    for name in ("Unknown", "UntestedUnknown", "UnprovenUnknown"):
        assert not hasattr(module, name)
