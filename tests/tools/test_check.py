"""`swa check`: what is right here, and settings that are really broken, each with its remedy."""

import json
import os
import shutil
import subprocess
import sys
import time
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
from swa_vllm.tools.check import device, files, inspection, problems
from swa_vllm.tools.check.problems import ProblemError
from swa_vllm.tools.cli import main
from swa_vllm.tools.common import progress
from tests.bad_input.checkpoints import CONFIG_FILES
from tests.bad_input.options import CONFIGS
from tests.bad_input.row import Bad
from tests.helpers.engines import ModelFactory
from tests.helpers.paths import DATA
from tests.helpers.tiny_models import FULL, MIXED, SLIDING

Figures = tuple[int, dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Figures]:
    """Exit status and JSON of a check in this process."""

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
    *_, layers, left_out = found["findings"]
    assert status == 0, layers
    assert [line.split()[-1] for line in layers["detail"].splitlines()[2:4]] == specs
    assert left_out["state"] == "not checked"
    assert "--deep compiles and runs them" in left_out["detail"]


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
    command = [sys.executable, "-m", "swa_vllm.tools.cli"]
    result = subprocess.run(
        [*command, "check", str(model), "--sink-tokens", "4", "--deep"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 14
    assert [line.split()[0] for line in (*lines[:8], *lines[-3:])] == ["ok"] * 11
    assert lines[0].endswith("window 40, 4 sink tokens, 2 of 4 layers slide")
    assert "equal the oracle" in lines[-2]
    assert "equals plain torch" in lines[-1]
    assert [line.split() for line in lines[-5:-3]] == [
        ["0-1", "full", "-", "-", "chosen", "by", "vLLM", "FullAttentionSpec"],
        ["2-3", "sliding", "40", "4", "CUSTOM", "SWASpec"],
    ]
    assert "\033" not in result.stdout
    assert "Triton is installed" not in result.stderr


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


BREAK = {
    "prefill, right": "",
    "prefill, all tokens generated": """
builder.split_at_prompt_ends = lambda batch: (batch, [True] * batch.num_reqs)""",
    "prefill, no token generated": """
builder.split_at_prompt_ends = lambda batch: (batch, [False] * batch.num_reqs)""",
    "decode, right": "",
    "decode, no token generated": """
builder.split_at_prompt_ends = lambda batch: (batch, [False] * batch.num_reqs)""",
    "decode, answers see all": """
builder.answer_tables = lambda batch, *_: (batch, *(torch.empty(0).long(),) * 2, {})""",
}


@pytest.fixture(scope="module")
def smoke_layers() -> dict[str, tuple[str, str]]:
    """What each check prints and raises, in processes that were forked with vLLM imported."""
    code = f"""
import io, json, sys, torch
from multiprocessing import get_context
from swa_backend.window import Phase
from swa_vllm.attention.cpu import builder
from swa_vllm.tools.check.smoke_layer import main

def check(name, change, said):
    sys.stdout, raised = io.StringIO(), ""
    exec(change)
    try:
        main(Phase(name.partition(",")[0]))
    except RuntimeError as error:
        raised = str(error)
    said.put((sys.stdout.getvalue(), raised))

fork, said = get_context("fork"), {{}}
for name, change in {BREAK!r}.items():
    queue = fork.SimpleQueue()
    process = fork.Process(target=check, args=(name, change, queue))
    process.start()
    process.join()
    said[name] = queue.get()
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: tuple(said) for name, said in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", BREAK)
def test_a_layer_of_one_phase_is_checked(
    name: str, smoke_layers: dict[str, tuple[str, str]]
) -> None:
    printed, raised = smoke_layers[name]
    if BREAK[name]:
        assert "output differs from plain torch's by" in raised
    else:
        assert float(printed.split()[-1]) < 0.02, raised


def test_a_process_that_dies_without_a_word_is_a_problem(tmp_path: Path) -> None:
    """As by an instruction that the processor lacks."""
    (tmp_path / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(ProblemError, match="dies ended with status -9"):
        device._error_of_smoke_test("dies", PYTHONPATH=str(tmp_path))


def test_a_smoke_test_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(device, "LIMIT_S", 0.5)
    with pytest.raises(ProblemError, match=r"hangs did not end within 0\.5 s"):
        device._error_of_smoke_test("hangs", PYTHONPATH=str(tmp_path))


# Faults of arguments, options and files, and what is said of each.
FAULTS = {
    "option": (["--window", "0"], "must be an integer >= 1"),
    "option by name": (["--additional-config", '{"swa": {"windw": 8}}'], "did you mean window?"),
    "option out of place": (["--additional-config", '{"window": 8}'], "where nothing reads it"),
    "option twice": (
        ["--window", "8", "--additional-config", '{"swa": {"window": 8}}'],
        "remove either",
    ),
    "no object": (["--additional-config", "8"], "--additional-config must be a JSON object"),
    "number": (["--max-model-len", "0"], "--max-model-len must be at least 1"),
    "layer": (["--window", "8", "--full-attention-layers", "9"], "layer 9 is out of range"),
    "length": (["--max-model-len", "513"], "more than the 512 tokens"),
    "shards": (["--tensor-parallel-size", "3"], "size 3 does not divide"),
    "stages": (["--pipeline-parallel-size", "5"], "size 5 is more than this model's 4 layers"),
    "dtype": (["--kv-cache-dtype", "int3"], "invalid choice: 'int3'"),
    "MODEL": (["--window", "8"], "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_needs_no_vllm_is_said_before_any_is_imported(fault: str) -> None:
    """Nor torch: so that the first error comes at once."""
    arguments, message = FAULTS[fault]
    model = "nowhere" if fault == "MODEL" else str(DATA / "tiny-swa-sliding")
    code = f"""
import sys
from swa_vllm.tools.cli import main
try:
    status = main(["check", {model!r}, *{arguments!r}])
except SystemExit as ended:
    status = ended.code
assert status
assert not {{"torch", "vllm", "transformers", "triton"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout + done.stderr


def test_weights_are_read_before_vllm_is_imported(tmp_path: Path) -> None:
    config = json.loads((DATA / "tiny-swa-sliding" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ProblemError, match="is cut short") as caught:
        files.inspect_files(str(tmp_path), {})
    assert caught.value.remedy == "download or copy the checkpoint again"


_LMCACHE = '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'


@pytest.mark.parametrize(
    ("given", "detail", "remedy"),
    [
        (
            ["--sink-tokens", "4", "--kv-cache-dtype", "fp8"],
            "swa.sink_tokens cannot be had with kv_cache_dtype=fp8",
            ["--sink-tokens", "4", "--kv-cache-dtype", "auto"],
        ),
        (["--pipeline-parallel-size", "2"], "fails in vLLM's CPU build", []),
        (
            ["--additional-config", '{"swa": {"window": 8, "prefill_pages": "few"}}'],
            'must be one of "auto", "survivors", "all"',
            ["--additional-config", '{"swa": {"window": 8, "prefill_pages": "all"}}'],
        ),
        (
            ["--max-num-batched-tokens", "8", "--max-num-seqs", "16"],
            "max_num_batched_tokens (8) must be greater than or equal to max_num_seqs",
            ["--max-num-batched-tokens", "1024", "--max-num-seqs", "16"],
        ),
        (
            ["--window", "8", "--kv-transfer-config", _LMCACHE, "--enable-lora"],
            "the KV connector LMCacheConnectorV1 (--kv-transfer-config) knows one table",
            # In front of MODEL stands the value of a flag that is vLLM's alone.
            ["--window", "8", "--enable-lora", "--max-loras", "2"],
        ),
    ],
    ids=["cache", "stages", "option", "vLLM", "vLLM's alone"],
)
def test_options_of_serving_reach_the_engine(
    given: list[str],
    detail: str,
    remedy: list[str],
    tiny_model: ModelFactory,
    check: Callable[..., Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What they make wrong is found, and the remedy works."""
    model = str(tiny_model(**MIXED))
    assert main(["check", model, *given]) == 1
    shown = capsys.readouterr()
    assert detail in shown.out + shown.err
    assert check(*remedy, model)[0] == 0


def test_flags_of_the_http_server_are_unknown(
    tiny_model: ModelFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tiny_model(**MIXED)), "--enforce-eager", "--port", "80"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --port 80; --help lists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    # Of no layers the file's reader says it in other words than the engine.
    [*(row for row in CONFIGS if row.name != "no layers"), *CONFIG_FILES],
    ids=lambda row: row.name[:60],
)
def test_the_remedy_of_a_message_stands_apart(row: Bad, tmp_path: Path) -> None:
    """Each fault of a config that the files show has one."""
    shutil.copy(DATA / "tiny-swa-sliding" / "config.json", tmp_path)
    if callable(row.given):
        row.given(tmp_path)
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        plain = {k: v for k, v in config.items() if k not in SLIDING and k != "layer_types"}
        (tmp_path / "config.json").write_text(json.dumps(plain | row.given))
    with pytest.raises(ProblemError) as caught:
        files.inspect_files(str(tmp_path), {})
    said = f"{caught.value}; {caught.value.remedy}".lower()
    assert not {word for word in row.do.lower().split() if word.strip(".;,") not in said}
    assert caught.value.remedy != problems._UNSAID


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_what_takes_long_is_told(slow: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.say_if_slow("checking a model", after_s=0.05 if slow else 60):
        time.sleep(0.3)
    assert capsys.readouterr().err == ("checking a model ...\n" if slow else "")


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
    assert "did not end within 2 s" in wrong["detail"]
    assert wrong["remedy"].startswith("see what keeps Python")
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
        assert wrong["remedy"] == "give the config.json of one"
        assert len(wrong["detail"]) < 600
