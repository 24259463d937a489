"""`swa check`: what is right here, and settings that are really broken, each with its remedy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm import ModelRegistry
from vllm.model_executor.models import qwen3 as stock
from vllm.model_executor.models import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

import swa_backend
import swa_vllm
from swa_backend import ops
from swa_backend.verify import smoke as smoke_module
from swa_vllm.compat import versions
from swa_vllm.tools.check import device, inspection
from swa_vllm.tools.check.steps import ProblemError
from swa_vllm.tools.cli import main
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL, MIXED

Figures = tuple[int, dict[str, Any]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figures]:
    """Exit status and JSON of a check in this process, without its slow steps."""
    for step in ("inspect_kernels", "inspect_cpu_operators"):
        monkeypatch.setattr(device, step, lambda *_: "not asked in this test")

    def run(*arguments: str) -> Figures:
        path = tmp_path / "check.json"
        status = main(["check", *arguments, "--json", str(path)])
        return status, json.loads(path.read_text())

    return run


@pytest.mark.parametrize(
    ("phase", "specs"),
    [
        ("prefill", ["PromptCacheSpec", "PromptCacheSpec"]),
        ("decode", ["PromptCacheSpec", "PromptWindowSpec"]),
    ],
)
def test_a_window_in_one_phase_only(
    phase: str, specs: list[str], tiny_model: ModelFactory, check: Callable[..., Figures]
) -> None:
    """Full layers are of another kind too: their prefix cache keeps prompts alone."""
    status, found = check(str(tiny_model(**MIXED)), "--phase", phase)
    *_, last = found["findings"]
    assert status == 0, last
    assert [line.split()[-1] for line in last["detail"].splitlines()[2:4]] == specs


def _last(figures: Figures) -> dict[str, Any]:
    status, found = figures
    states = [finding["state"] for finding in found["findings"]]
    assert status == 1
    assert not found["ok"]
    assert states.count("wrong") == 1
    assert states[-1] == "wrong"
    return dict(found["findings"][-1])


def test_all_is_well_in_a_process_of_its_own(tiny_model: ModelFactory, tmp_path: Path) -> None:
    """Kernels are compiled and run, and one layer in an engine."""
    model = tiny_model(**MIXED)
    result = subprocess.run(
        [sys.executable, "-m", "swa_vllm.tools.cli", "check", str(model), "--sink-tokens", "4"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:10]] == ["ok"] * 10
    assert "equal the oracle" in lines[7]
    assert "equals plain torch" in lines[8]
    assert [line.split() for line in lines[-2:]] == [
        ["0-1", "full", "-", "-", "chosen", "by", "vLLM", "FullAttentionSpec"],
        ["2-3", "sliding", "40", "4", "CUSTOM", "SWASpec"],
    ]
    assert "\033" not in result.stdout


@pytest.mark.parametrize("value", ["", "other"])
def test_a_plugin_that_is_left_out(
    value: str, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    wrong = _last(check())
    assert wrong["detail"] == f"VLLM_PLUGINS={value!r} leaves the plugin 'swa' out"
    assert wrong["remedy"] == "unset VLLM_PLUGINS, or add swa to its names"


class OtherQwen3(stock.Qwen3ForCausalLM):
    """The model of another plugin."""


@pytest.mark.parametrize("comes_first", [True, False])
def test_another_plugin_holds_an_architecture(
    comes_first: bool, clean_registries: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    ModelRegistry.register_model("Qwen3ForCausalLM", OtherQwen3)
    if comes_first:
        swa_vllm.register()
        swa_vllm.register()  # changes nothing
    wrong = _last(check())
    assert wrong["what"] == "models"
    assert f"{__name__}:OtherQwen3, not to swa_vllm.models.qwen3" in wrong["detail"]
    assert "set VLLM_PLUGINS" in wrong["remedy"]


def test_another_plugin_holds_the_backend_slot(
    clean_registries: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    register_backend(AttentionBackendEnum.CUSTOM, "other_plugin.Backend")
    wrong = _last(check())
    assert wrong["what"] == "attention backend"
    assert "other_plugin.Backend" in wrong["detail"]
    assert "VLLM_PLUGINS" in wrong["remedy"]


def test_another_manager_has_the_pages(
    monkeypatch: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    monkeypatch.setattr(KVCacheSpecRegistry, "get_manager_class", lambda spec: OtherQwen3)
    wrong = _last(check())
    assert wrong["what"] == "page manager"
    assert "OtherQwen3'>, not with SWAManager" in wrong["detail"]


def test_an_untested_vllm(
    clean_registries: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    clean_registries.setattr(versions, "vllm_version", lambda: "0.99.0")
    assert "0.99.0, and this plugin was tested with 0.32" in _last(check())["detail"]
    clean_registries.setenv("SWA_ALLOW_UNTESTED_VLLM", "1")
    swa_vllm.register()
    assert check()[0] == 0


def test_an_untested_vllm_that_was_allowed_too_late(
    clean_registries: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    clean_registries.setattr(versions, "vllm_version", lambda: "0.99.0")
    swa_vllm.register()
    clean_registries.setattr(versions, "vllm_version", lambda: "0.32.0")
    assert "windows are refused for all models" in _last(check())["detail"]


def test_another_version_is_imported_than_is_installed(
    monkeypatch: pytest.MonkeyPatch, check: Callable[..., Figures]
) -> None:
    monkeypatch.setattr(swa_backend, "__version__", "9.9")
    assert "is installed, but 9.9 is imported" in _last(check())["detail"]


def test_no_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None\nfrom swa_vllm.tools.cli import main\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main(['check']))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "wrong        vLLM: not installed" in result.stdout
    assert "swa-backend[gpu]" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "64", "--full-attention-layers", "9"], "layer 9 is out of range"),
        (["--sink-tokens", "4"], "sink_tokens would have no effect: no layer has a window"),
    ],
)
def test_options_that_the_engine_would_refuse(
    options: list[str],
    message: str,
    tiny_model: ModelFactory,
    check: Callable[..., Figures],
) -> None:
    assert message in _last(check(str(tiny_model(**FULL)), *options))["detail"]


def test_models_that_no_window_can_be_had_for(
    tiny_llama: Path, tmp_path: Path, check: Callable[..., Figures]
) -> None:
    assert "model_type 'llama' is no Qwen3" in _last(check(str(tiny_llama)))["detail"]
    assert "does not exist" in _last(check(str(tmp_path / "nothing")))["detail"]


def test_a_kernel_that_is_wrong_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which the tests run in."""
    decode = ops.decode_attention
    monkeypatch.setattr(
        ops, "decode_attention", lambda *a, **k: decode(*a, **{**k, "sink_tokens": 3})
    )
    with pytest.raises(RuntimeError, match="decode kernel differs from the oracle by"):
        smoke_module.smoke(smoke_module.torch.device("cpu"))


@pytest.mark.parametrize("sees_all", [None, True, False], ids=["right", "all", "none"])
def test_a_layer_of_phase_prefill_is_checked(sees_all: bool | None) -> None:
    """A wrong one is found, of which all tokens or none count as generated."""
    code = f"""
from swa_backend.window import Phase
from swa_vllm.attention.cpu import builder
from swa_vllm.tools.check.smoke_layer import main
if {sees_all} is not None:
    builder.split_at_prompt_ends = lambda batch: (batch, [{sees_all}] * batch.num_reqs)
main(Phase.PREFILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if sees_all is None:
        assert float(done.stdout.split()[-1]) < 0.02, done.stderr[-2000:]
    else:
        assert "output differs from plain torch's by" in done.stderr


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "builder.split_at_prompt_ends = lambda batch: (batch, [False] * batch.num_reqs)",
        "builder.answer_tables = lambda batch, *_: (batch, *(torch.empty(0).long(),) * 2, {})",
    ],
    ids=["right", "all prompts", "answers see all"],
)
def test_a_layer_of_phase_decode_is_checked(broken: str) -> None:
    code = f"""
import torch
from swa_backend.window import Phase
from swa_vllm.attention.cpu import builder
from swa_vllm.tools.check.smoke_layer import main
{broken}
main(Phase.DECODE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if broken:
        assert "output differs from plain torch's by" in done.stderr
    else:
        assert float(done.stdout.split()[-1]) < 0.02, done.stderr[-2000:]


def test_a_process_that_dies_without_a_word_is_a_problem(tmp_path: Path) -> None:
    """As by an instruction that the processor lacks."""
    (tmp_path / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(ProblemError, match="dies ended with status -9"):
        device._error_of_smoke_test("dies", PYTHONPATH=str(tmp_path))


def test_an_inspection_by_vllm_that_hangs_is_told_of_and_ended(
    tiny_model: ModelFactory,
    clean_registries: pytest.MonkeyPatch,
    check: Callable[..., Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Else it need not inspect.
    clean_registries.setattr(
        registry._LazyRegisteredModel, "_load_modelinfo_from_cache", lambda self, digest: None
    )
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    clean_registries.setattr(registry, "_SUBPROCESS_COMMAND", [*sleep, registry.__name__])
    clean_registries.setattr(
        inspection, "limit_inspection", partial(inspection.limit_inspection, 0.5, 2.0)
    )
    # vLLM remembers what it found for a class.
    uncached = registry._try_inspect_model_cls.__wrapped__
    clean_registries.setattr(registry, "_try_inspect_model_cls", uncached)
    wrong = _last(check(str(tiny_model(**MIXED))))
    assert "inspection of the model's class" in wrong["detail"]
    assert "did not end within 2 s. See what keeps Python" in wrong["detail"]
    assert "vLLM inspects the model's class in another process" in capsys.readouterr().err


def test_an_architecture_of_another_family_is_told_in_one_sentence(
    tiny_model: ModelFactory, tmp_path: Path, check: Callable[..., Figures]
) -> None:
    """Of one that vLLM does not know, vLLM lists all that it knows."""
    config = json.loads((tiny_model(**FULL) / "config.json").read_text())
    for name in ("NosuchForCausalLM", "LlamaForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        wrong = _last(check(str(tmp_path), "--window", "64"))
        assert wrong["detail"].startswith(f"architectures {name}: not served with windows")
        assert "Qwen3ForCausalLM" in wrong["detail"]
        assert "Give the config.json of one" in wrong["detail"]
        assert len(wrong["detail"]) < 600
