"""`swa plan`: what it says of engines that were then started, of configs, and of nonsense."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.config import LoadConfig, ModelConfig, ParallelConfig

from swa_backend.checkpoint import read_checkpoint
from swa_backend.layers import resolve_layers
from swa_backend.options import SWAConfigError, SWAOptions
from swa_vllm.config.cache_dtype import checkpoints_cache_dtype
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.sizing import (
    bytes_of_an_element,
    kv_heads_of_a_device,
    longest_text_in_limits,
    size_cache_dtype,
)
from tests.helpers.engines import EngineFactory, ModelFactory, scheduler
from tests.helpers.hybrid_models import PAGE_SIZE, save_tiny_hybrid
from tests.helpers.quantized_models import FORMATS, FP8_CACHE
from tests.helpers.tiny_models import (
    BY_LAYER_TYPES,
    FULL,
    MIXED,
    ROPE,
    SLIDING,
    random_prompts,
    tiny_config,
)

PROMPT, OUTPUT = 300, 130


@dataclass(frozen=True)
class Started:
    """A checkpoint, and how it is served.

    Attributes:
        options: of the plugin.
        kwargs: other arguments of the engine.
    """

    checkpoint: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    arm: str = "this plugin"


STARTED = {
    "mixed, short chunks": Started(MIXED, kwargs={"max_num_batched_tokens": 48}),
    "one full layer of four": Started(FULL, {"window": 56, "full_attention_layers": "every:4"}),
    "padded: three full layers, four sliding": Started(
        {**FULL, "num_hidden_layers": 7}, {"window": 33, "full_attention_layers": "0-2"}
    ),
    "two windows beside full layers": Started(
        {**FULL, "num_hidden_layers": 7},
        {"window": {"0-2": 33, "3-4": 100}, "sink_tokens": 4},
        {"max_num_batched_tokens": 48},
    ),
    "sinks": Started(SLIDING, {"sink_tokens": 4}, {"block_size": 64}),
    "mixed, sinks": Started(
        MIXED, {"sink_tokens": 70, "full_attention_layers": "0"}, {"max_num_batched_tokens": 100}
    ),
    "bfloat16, chunks longer than the text": Started(
        BY_LAYER_TYPES, kwargs={"dtype": "bfloat16", "max_num_batched_tokens": 2048}
    ),
    "window in the prompt only": Started(
        MIXED, {"phase": "prefill"}, {"max_num_batched_tokens": 100}
    ),
    "window in the prompt only, sinks": Started(
        FULL, {"window": 33, "phase": "prefill", "sink_tokens": 70, "full_attention_layers": "0-2"}
    ),
    "window in generated tokens only": Started(
        MIXED, {"phase": "decode"}, {"max_num_batched_tokens": 100}
    ),
    "window in generated tokens only, more sinks than prompt": Started(
        {**FULL, "num_hidden_layers": 7},
        {"window": 9, "phase": "decode", "sink_tokens": 301, "full_attention_layers": "0-2"},
    ),
    "full attention of a sliding checkpoint": Started(
        MIXED, {"enabled": False}, arm="full attention"
    ),
}


def _plan(model: Path, started: Started, path: Path) -> dict[str, Any]:
    """The figures, with the sizes that engines of these tests are started with."""
    sizes = {"block_size": 32, "dtype": "float32", "max_num_batched_tokens": 512, **started.kwargs}
    sizes |= {"max_model_len": 512, "max_num_seqs": 8, "kv_memory": "1GiB"}
    sizes |= {k: v for k, v in started.options.items() if k != "enabled"}
    sizes |= {"device": "cpu", "prompt": PROMPT, "output": OUTPUT, "json": path}
    sizes = {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in sizes.items()}
    flags = [x for k, v in sizes.items() for x in (f"--{k.replace('_', '-')}", v)]
    assert main(["plan", str(model), *flags]) == 0
    return dict(json.loads(path.read_text()))


def _walk(llm: LLM) -> list[int]:
    """Pages that one request holds after each step."""
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    (prompt,) = random_prompts([PROMPT])
    llm.llm_engine.add_request("planned", {"prompt_token_ids": prompt}, params)
    groups = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        tables = [table for group in groups for table in group.req_to_blocks.values()]
        held.append(sum(not block.is_null for table in tables for block in table))
    return held[:-1]  # the last step gives all back


@pytest.mark.parametrize("name", STARTED)
def test_a_started_engine_has_what_was_planned(
    name: str, engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    started = STARTED[name]
    model = tiny_model(**started.checkpoint)
    llm = engine(
        model,
        # Poison would be written to all of the 1 GiB that VLLM_CPU_KVCACHE_SPACE gives.
        additional_config={"swa": {"debug_poison": False, **started.options}},
        enable_prefix_caching=False,
        num_gpu_blocks_override=None,
        **{"max_num_batched_tokens": 512, **started.kwargs},
    )
    figures = _plan(model, started, tmp_path / "plan.json")
    planned, real = figures["pools"][started.arm], scheduler(llm).kv_cache_config
    assert planned["num_pages"] == real.num_blocks
    assert sum(group["num_groups"] for group in planned["groups"]) == len(real.kv_cache_groups)
    size = {len(g.layer_names) for g in real.kv_cache_groups}
    layer_bytes = {g.kv_cache_spec.page_size_bytes for g in real.kv_cache_groups}
    assert planned["page_bytes"] == max(size) * layer_bytes.pop()
    assert planned["estimate"] == llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
    held = _walk(llm)
    (request,) = figures["requests"]
    assert request["arms"][started.arm]["peak_pages"] == max(held)
    assert request["arms"][started.arm]["last_pages"] == held[-1]


HYBRIDS: dict[str, dict[str, Any]] = {
    "all slide": {"window": 100},
    "one layer slides, sinks": {"window": 40, "full_attention_layers": "1", "sink_tokens": 4},
    "in the prompt only": {"window": 40, "phase": "prefill"},
    "in the answer only": {"window": 40, "phase": "decode"},
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_started_engine_with_linear_attention_has_what_was_planned(
    name: str, engine: EngineFactory, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    options = HYBRIDS[name]
    kwargs = {
        "dtype": "bfloat16",
        "max_num_batched_tokens": 128,
        "mamba_ssm_cache_dtype": "float32",
    }
    started = Started({}, options, kwargs)
    model = save_tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "Qwen3NextForCausalLM")
    options = {"swa": {"debug_poison": False, **options}}
    llm = engine(model, additional_config=options, num_gpu_blocks_override=None, **kwargs)
    figures = _plan(model, started, tmp_path / "plan.json")
    planned, real = figures["pools"][started.arm], scheduler(llm).kv_cache_config
    sizes = {group.kv_cache_spec.block_size for group in real.kv_cache_groups}
    assert sizes == {figures["block_size"]} == {PAGE_SIZE}
    assert planned["num_pages"] == real.num_blocks
    assert sum(group["num_groups"] for group in planned["groups"]) == len(real.kv_cache_groups)
    (layers,) = {len(group.layer_names) for group in real.kv_cache_groups}
    (layer_bytes,) = {group.kv_cache_spec.page_size_bytes for group in real.kv_cache_groups}
    assert planned["page_bytes"] == layers * layer_bytes
    assert planned["estimate"] == llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
    held = _walk(llm)
    (request,) = figures["requests"]
    assert request["arms"][started.arm]["peak_pages"] == max(held)
    assert request["arms"][started.arm]["last_pages"] == held[-1]


CONFIGS = {
    "full": FULL,
    "mixed": MIXED,
    "by layer types": BY_LAYER_TYPES,
    "default window": {"use_sliding_window": True, "max_window_layers": 1},
    "no KV heads": {"num_key_value_heads": None},
    "yarn": {"rope_parameters": ROPE["yarn"]},
    "linear": {"rope_parameters": ROPE["linear"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_by_transformers(name: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(**CONFIGS[name])
    ours, theirs = read_checkpoint(model), AutoConfig.from_pretrained(model)
    assert ours == read_checkpoint(model / "config.json")
    shape = (ours.num_layers, ours.num_kv_heads, ours.head_dim, ours.max_positions)
    assert shape == (
        theirs.num_hidden_layers,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.max_position_embeddings,
    )
    for options in ({}, {"window": 9, "full_attention_layers": "0"}, {"sink_tokens": 4}):
        assert _resolved(ours.config, options) == _resolved(theirs, options)


def _resolved(config: Any, options: dict[str, Any]) -> Any:
    try:
        return resolve_layers(config, SWAOptions.from_dict(options), max_model_len=10_000)
    except SWAConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "nested"),
    [
        ("qwen3_vl", {"text_config": {"model_type": "qwen3_vl_text"}}),
        ("qwen3_vl_moe", {"text_config": {"model_type": "qwen3_vl_moe_text"}}),
        (
            "qwen3_omni_moe",
            {"thinker_config": {"text_config": {"model_type": "qwen3_omni_moe_text"}}},
        ),
    ],
)
def test_a_derived_models_text_layers_are_planned(
    kind: str, nested: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape |= {"head_dim": 64, "hidden_size": 256, "max_position_embeddings": 4096}
    inner = nested.get("thinker_config", nested)
    inner["text_config"] |= shape
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **nested}))
    ours = read_checkpoint(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs = getattr(theirs, "thinker_config", theirs).get_text_config()
    assert (ours.num_layers, ours.num_kv_heads, ours.head_dim) == (6, 2, 64)
    options = {"window": 100, "full_attention_layers": "every:3"}
    assert _resolved(ours.config, options) == _resolved(theirs, options)


@pytest.mark.parametrize("kind", [{}, {"model_type": "qwen3_asr_text"}], ids=["unsaid", "said"])
def test_text_layers_of_a_speech_model_are_planned(kind: dict[str, str], tmp_path: Path) -> None:
    text = tiny_config(**FULL).to_dict() | {"model_type": None} | kind
    config = {"model_type": "qwen3_asr", "thinker_config": {"text_config": text}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = _resolved(read_checkpoint(tmp_path).config, {"window": 100})
    assert plan.windows == (100,) * text["num_hidden_layers"]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_devices_store_what_vllm_gives_them(num_kv_heads: int, size: int, tmp_path: Path) -> None:
    sizes = {"num_key_value_heads": num_kv_heads, "num_attention_heads": 8}
    tiny_config(**sizes, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    parallel = ParallelConfig(tensor_parallel_size=1)
    parallel.tensor_parallel_size = size  # as many devices are not here
    planned = kv_heads_of_a_device(read_checkpoint(tmp_path), size)
    assert planned == config.get_num_kv_heads(parallel)


@pytest.mark.parametrize("rope", ["default", "linear", "yarn"])
def test_the_longest_text_is_vllms(rope: str, tmp_path: Path) -> None:
    tiny_config(rope_parameters=ROPE[rope], architectures=["Qwen3ForCausalLM"]).save_pretrained(
        tmp_path
    )
    config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    assert longest_text_in_limits(read_checkpoint(tmp_path)) == config.max_model_len


@pytest.mark.parametrize("dtype", ["auto", "float32", "half"])
@pytest.mark.parametrize("checkpoint_dtype", ["bfloat16", "float16", "float32"])
def test_an_element_takes_the_bytes_of_vllms_dtype(
    checkpoint_dtype: str, dtype: str, tmp_path: Path
) -> None:
    tiny_config(dtype=checkpoint_dtype, architectures=["Qwen3ForCausalLM"]).save_pretrained(
        tmp_path
    )
    config = ModelConfig(str(tmp_path), dtype=dtype, skip_tokenizer_init=True)
    planned = bytes_of_an_element(read_checkpoint(tmp_path), dtype, "auto")
    assert planned == config.dtype.itemsize


_STATIC = {"type": "float", "num_bits": 8, "dynamic": False}
_BEFORE_0_31 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
# What a quantized checkpoint says of its KV cache.
CACHES: dict[str, dict[str, Any]] = {
    "not quantized": {},
    "w8a8": {"quantization_config": FORMATS["w8a8"][1]},
    "gptq": {"quantization_config": FORMATS["gptq"][1]},
    **{tool: {"quantization_config": said} for tool, said in FP8_CACHE.items()},
    "compressed_tensors": {
        "quantization_config": FP8_CACHE["compressed-tensors"]
        | {"quant_method": "Compressed_Tensors"}
    },
    "compression_config": {"compression_config": FP8_CACHE["compressed-tensors"]},
    **{
        f"modelopt, {key}={value}": {
            "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", key: value}
        }
        for key, value in [
            ("kv_cache_quant_algo", "nvfp4"),
            ("kv_cache_quant_algo", "INT8"),
            ("kv_cache_quant_algo", None),
            ("kv_cache_scheme", _STATIC),
            ("kv_cache_scheme", {**_STATIC, "dynamic": True}),
            ("kv_cache_scheme", {**_STATIC, "num_bits": 4}),
            ("kv_cache_scheme", "fp8"),
            ("quantization", {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
        ]
    },
    "modelopt, unnamed": {
        "quantization_config": {
            **_BEFORE_0_31,
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        }
    },
    "modelopt, in a file of its own": {
        "hf_quant_config.json": {
            **_BEFORE_0_31,
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        }
    },
}


@pytest.mark.parametrize("name", CACHES)
def test_an_fp8_cache_that_the_checkpoint_asks_for_is_planned(name: str, tmp_path: Path) -> None:
    keys = dict(CACHES[name])
    if (beside := keys.pop("hf_quant_config.json", None)) is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    config = tiny_config(architectures=["Qwen3ForCausalLM"], dtype="bfloat16").to_dict() | keys
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    served: Any = SimpleNamespace(model_config=model, load_config=LoadConfig(), quant_config=None)
    planned = read_checkpoint(tmp_path)
    dtype = size_cache_dtype(planned.quantization)
    assert dtype == checkpoints_cache_dtype(served)
    if dtype == "nvfp4":
        with pytest.raises(ValueError, match=r"asks for a KV cache in nvfp4.*give --kv"):
            bytes_of_an_element(planned, "auto", "auto")
    else:
        assert bytes_of_an_element(planned, "auto", "auto") == (2 if dtype == "auto" else 1)
    assert bytes_of_an_element(planned, "auto", "bfloat16") == 2


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "use_sliding_window": False,
}


@pytest.fixture
def qwen3_8b(tmp_path: Path) -> Path:
    """A config.json alone, of the released model's shape."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_8B))
    return path


def test_the_24_gb_card_of_the_results(qwen3_8b: Path, tmp_path: Path) -> None:
    """2048 pages of 16 tokens: what vLLM's scheduler did there, by examples/results/README.md."""
    path = tmp_path / "plan.json"
    flags = ["--window", "1024", "--kv-memory", "4608MiB", "--prompt", "32000"]
    assert main(["plan", str(qwen3_8b), *flags, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    pools = {arm: (pool["num_pages"], pool["starts"]) for arm, pool in figures["pools"].items()}
    assert pools == {
        "full attention": (2048, False),
        "stock vLLM": (2048, True),
        "this plugin": (2048, True),
    }
    here = figures["requests"][0]["arms"]["this plugin"]
    assert here["peak_pages"] == 129
    assert 25 < here["running"] < 31  # the 80 requests of that page have a beginning and an end


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_plan_needs_neither_vllm_nor_torch(qwen3_8b: Path) -> None:
    code = """
import sys
from swa_vllm.tools.cli import main
missing = {"vllm", "transformers", "tqdm", "matplotlib", *(["torch"] if "plan" in sys.argv else [])}
class Missing:
    def find_spec(name, path=None, target=None):
        if name in missing:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing)
sys.exit(main(sys.argv[1:]))
"""
    flags = (str(qwen3_8b), "--window", "4096", "--kv-memory", "8GiB", "--prompt", "8000")
    result = _run(code, "plan", *flags)
    assert result.returncode == 0, result.stderr
    assert "vLLM's start-up estimate" in result.stdout
    assert "\033" not in result.stdout
    result = _run(code, "bench", "decode")
    assert result.returncode == 1
    assert "error: swa bench needs vLLM, which is not installed" in result.stderr
    result = _run(code, "plan", *flags, "--plot", str(qwen3_8b.with_suffix(".png")))
    assert result.returncode == 1
    assert "pip install 'swa-backend[plot]'" in result.stderr


def test_a_plan_obeys_vllms_partition_of_layers_and_names_it(
    qwen3_8b: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """36 layers, a token takes 4 KiB in each: half of them in a stage, or 26."""
    path = tmp_path / "plan.json"
    flags = ["plan", str(qwen3_8b), "--window", "4096", "--pipeline-parallel-size", "2"]

    def planned() -> tuple[str, int]:
        assert main([*flags, "--json", str(path)]) == 0
        pools = json.loads(path.read_text())["pools"]
        return capsys.readouterr().out, pools["this plugin"]["page_bytes"]

    text, page_bytes = planned()
    assert "takes 72 KiB in the 18 layers of a stage (" in text
    assert page_bytes == 18 * 16 * 4096
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "10,26")
    text, page_bytes = planned()
    assert "takes 104 KiB in the 26 layers of a stage by VLLM_PP_LAYER_PARTITION=10,26 (" in text
    assert page_bytes == 26 * 16 * 4096
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "10,25")
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "VLLM_PP_LAYER_PARTITION=10,25 does not divide this model's 36 layers among" in error


def test_a_reader_that_has_enough_is_no_error(qwen3_8b: Path) -> None:
    pipe = f"{sys.executable} -m swa_vllm.tools.cli plan {qwen3_8b} --window 64 | true"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_a_plan_is_drawn(qwen3_8b: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    flags = ["--window", "4096", "--kv-memory", "8GiB", "--output", "64", "--plot", str(path)]
    assert main(["plan", str(qwen3_8b), *flags]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plan", "check", "trace"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([name, "--help"])
    assert status.value.code == 0
    assert f"example: swa {name} " in capsys.readouterr().out


def test_stock_vllms_column_says_what_stock_cannot_do(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--window", "4096", "--sink-tokens", "4", "--full-attention-layers", "every:4"]
    assert main(["plan", str(qwen3_8b), *flags, "--kv-memory", "4GiB"]) == 0
    printed = capsys.readouterr().out
    assert "stock vLLM's own Qwen3 refuses this mix of full and sliding layers" in printed
    assert "  stock vLLM 0.32/0.33  this plugin" in printed
    assert "stock vLLM has no sink tokens" in printed
    assert "full attention does not start with --max-model-len 40960 (at most 29104)" in printed


def test_a_phase_says_what_stays_and_what_stock_vllm_has_not(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 32768 + 8192 tokens with a window of 1024, in pages of 16."""
    sizes = ["--window", "1024", "--prompt", "32768", "--output", "8192", "--json", "-"]
    peaks = {}
    for phase, said in {
        "prefill": "in its column answers have the window too",
        "decode": "in its column prompts have the window too",
    }.items():
        assert main(["plan", str(qwen3_8b), *sizes, "--phase", phase]) == 0
        printed = capsys.readouterr()
        assert said in printed.err
        peaks[phase] = json.loads(printed.out)["requests"][0]["arms"]["this plugin"]["peak_pages"]
    # Two steps are in flight, so two tokens beside the 1023 that the next one sees.
    assert peaks == {"prefill": 40960 // 16, "decode": 32768 // 16 + 1024 // 16 + 1}


PHASES = ("both", "prefill", "decode")
SMALL = ["--max-model-len", "2048", "--max-num-batched-tokens", "256", "--kv-memory", "1GiB"]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("asked", PHASES)
def test_every_plan_has_the_three_phases_as_each_would_be_planned(
    asked: str, device: str, qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--window", "128", "--sink-tokens", "4", "--full-attention-layers", "every:4", *SMALL]
    sizes += ["--prompt", "300,500", "--output", "600", "--block-size", "16"]

    def planned(phase: str) -> tuple[dict[str, Any], str]:
        flags = [*sizes, "--phase", phase, "--device", device, "--json", "-"]
        assert main(["plan", str(qwen3_8b), *flags]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    compared, text = planned(asked)
    assert list(compared["phases"]) == list(PHASES)
    for phase, figures in compared["phases"].items():
        alone, _ = planned(phase)
        assert figures["pool"] == alone["pools"]["this plugin"]
        for request, own in zip(figures["requests"], alone["requests"], strict=True):
            sizes_of = {name: own[name] for name in ("prompt", "output")}
            assert request == {**sizes_of, **own["arms"]["this plugin"]}
    running = [
        [request["running"] for request in figures["requests"]]
        for figures in compared["phases"].values()
    ]
    assert running[0] > running[2] > running[1]
    lines = text.splitlines()
    (start,) = (i for i, line in enumerate(lines) if "this plugin by --phase" in line)
    named = [f"{phase}*" if phase == asked else phase for phase in PHASES]
    header = f"prompt pages: {' '.join(named)} MiB: {' '.join(named)} at once: {' '.join(named)}"
    assert lines[start + 1].split() == header.split()
    for index, line in enumerate(lines[start + 2 : start + 4]):
        requests = [figures["requests"][index] for figures in compared["phases"].values()]
        assert line.split() == [
            str(requests[0]["prompt"]),
            *(str(r["peak_pages"]) for r in requests),
            *(f"{r['peak_bytes'] / 2**20:.1f}" for r in requests),
            *(f"{r['running']:.1f}" for r in requests),
        ]


def test_a_phase_that_would_not_start_says_from_which_length_it_does(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(qwen3_8b), "--window", "4096", "--kv-memory", "3GiB"]) == 0
    printed = capsys.readouterr().out
    for phase in ("prefill", "decode"):
        note = f"--phase {phase} does not start with --max-model-len 40960 (at most 21824)"
        assert note in printed
    assert "--phase both does" not in printed


def test_a_phase_that_is_refused_is_left_out_with_its_reason(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--window", "1024", "--device", "cpu", "--kv-cache-dtype", "fp8", "--json", "-"]
    assert main(["plan", str(qwen3_8b), *flags]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert list(figures["phases"]) == ["both", "prefill"]
    assert list(figures["refused_phases"]) == ["decode"]
    reason = "--phase decode cannot be had with --kv-cache-dtype fp8: not tested on CPUs"
    assert f"note: --phase decode is left out: {reason}\n" in printed.err
    assert main(["plan", str(qwen3_8b), *flags, "--phase", "decode"]) == 1
    assert figures["refused_phases"]["decode"] in capsys.readouterr().err


def test_a_model_of_one_phase_has_no_table_of_phases(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen3_8b.write_text(json.dumps(QWEN3_8B | {"architectures": ["Qwen3Model"]}))
    assert main(["plan", str(qwen3_8b), "--window", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "this plugin by --phase" not in printed
    for phase in ("prefill", "decode"):
        assert f"--phase {phase} is left out: --phase {phase} was not tested with" in printed


def test_a_plan_takes_the_options_of_serving(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``--additional-config``, as by flags; what is not planned is refused."""

    def planned(*flags: str) -> str:
        assert main(["plan", str(qwen3_8b), "--prompt", "8000", *flags]) == 0
        return capsys.readouterr().out

    section = '{"swa": {"window": 1024, "sink_tokens": 4, "full_attention_layers": "every:4"}}'
    flags = ["--window", "1024", "--sink-tokens", "4", "--full-attention-layers", "every:4"]
    assert planned("--additional-config", section) == planned(*flags)
    every_page = '{"swa": {"window": 1024, "prefill_pages": "all"}}'
    assert main(["plan", str(qwen3_8b), "--additional-config", every_page]) == 1
    assert "with which requests hold more; leave it out" in capsys.readouterr().err


def test_a_window_that_requests_fit_into_is_told(
    qwen3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def note(prompts: str) -> str:
        flags = ["--window", "4096", "--sink-tokens", "4", "--prompt", prompts]
        assert main(["plan", str(qwen3_8b), *flags, "--output", "100"]) == 0
        (*found,) = (line for line in capsys.readouterr().out.splitlines() if "fit into" in line)
        return "".join(found)

    assert note("4001,8000") == ""
    assert "note: these requests of up to 4100 tokens, prompt" in note("500,4000,8000")
    assert (
        "these requests, prompt and answer together, fit into the window and its sinks (4100"
        in (note("500,4000"))
    )
