"""Random forms of a config.json: `swa plan` refuses what engines refuse, and agrees on the rest."""

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.v1.kv_cache_interface import MambaSpec

import swa_vllm
from swa_backend.checkpoint import LinearState, read_checkpoint
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.sizing import page_size_with_states
from tests.helpers.engines import ModelFactory, resolve_here
from tests.helpers.tiny_models import SLIDING as SLIDING_CHECKPOINT

LAYERS = 4
FULL, SLIDING = "full_attention", "sliding_attention"
# Values of each key that transformers takes.
RIGHT: dict[str, list[Any]] = {
    "num_hidden_layers": [LAYERS],
    "num_attention_heads": [4, 8],
    "num_key_value_heads": [1, 2],
    "head_dim": [32, 64],
    "hidden_size": [128, 256],
    "max_position_embeddings": [512, 4096],
    "dtype": ["bfloat16", "float32"],
    "torch_dtype": ["float16"],
    "use_sliding_window": [True, True, False],
    "sliding_window": [64, None, 0],
    "max_window_layers": [0, 2, LAYERS],
    "layer_types": [[FULL, SLIDING] * 2, [SLIDING] * LAYERS, ["attention", SLIDING] * 2],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 2.0, "rope_theta": 1e6},
        {"rope_type": "default"},
    ],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {}],
    "is_causal": [True, True, True, False],
    "dual_chunk_attention_config": [None, None, {"chunk_size": 64}],
}
WRONG: list[Any] = [None, "4", 2.5, True, [], [1], [FULL] * 3, {}, -1, SLIDING]
USUAL = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Form:
    """A config.json, and what is asked for beside it."""

    config: dict[str, Any]
    window: int | None
    phase: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The plugin's options."""
        asked = {"window": self.window, "phase": self.phase}
        return {key: value for key, value in asked.items() if value is not None}


@st.composite
def forms(draw: st.DrawFn, kind: str, architecture: str) -> Form:
    """Usual values, with some keys changed or added, some missing, and at most one wrong."""
    config: dict[str, Any] = {**USUAL, "model_type": kind, "architectures": [architecture]}
    for key in draw(st.sets(st.sampled_from(sorted(RIGHT)), max_size=8)):
        config[key] = draw(st.sampled_from(RIGHT[key]))
    for key in draw(st.sets(st.sampled_from(sorted(RIGHT)), max_size=3)):
        config.pop(key, None)
    for key in draw(st.sets(st.sampled_from(sorted(RIGHT)), max_size=1)):
        config[key] = draw(st.sampled_from(WRONG))
    window, phase = (
        draw(st.sampled_from([None, 8])),
        draw(st.sampled_from([None, "prefill", "decode"])),
    )
    return Form(config, window, phase)


@pytest.fixture(scope="module", autouse=True)
def _known_models() -> None:
    swa_vllm.register()
    for architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        resolve_here(architecture)


@contextmanager
def written(form: Form) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(form.config))
        yield Path(directory)


def served(model: Path, form: Form) -> dict[str, Any] | str:
    """What an engine would hold; or why there would be none."""
    try:
        AutoConfig.from_pretrained(model)  # vLLM tries again after a while
        config = EngineArgs(
            str(model), skip_tokenizer_init=True, additional_config={"swa": form.options}
        ).create_engine_config()
        windows = SWAConfig.from_vllm(config).layers.windows
    except Exception as error:  # transformers, vLLM and pydantic have their own
        return repr(error)
    if not any(windows):
        return "no window"
    theirs = config.model_config
    return {
        "windows": list(windows),
        "kv_heads": theirs.get_total_num_kv_heads(),
        "head_dim": theirs.get_head_size(),
        "number_bytes": theirs.dtype.itemsize,
        "max_model_len": theirs.max_model_len,
    }


def planned(model: Path, form: Form) -> dict[str, Any] | str:
    """What is planned; or what the error says."""
    flags = [part for key, value in form.options.items() for part in (f"--{key}", str(value))]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["plan", str(model), *flags, "--output", "1", "--json", "-"])
    if status:
        assert status == 1
        assert err.getvalue().startswith("error: ")
        return err.getvalue()
    figures = json.loads(out.getvalue())
    keys = ("windows", "kv_heads", "head_dim", "number_bytes", "max_model_len")
    return {key: figures[key] for key in keys}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("qwen3", "Qwen3ForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM")],
)
def test_plan_and_engine_agree(
    kind: str, architecture: str, record_property: Callable[[str, object], None]
) -> None:
    compared: list[bool] = []

    @settings(max_examples=500, derandomize=True, database=None)
    @given(forms(kind, architecture))
    def compare(form: Form) -> None:
        with written(form) as model:
            engine, plan = served(model, form), planned(model, form)
        compared.append(isinstance(engine, dict))
        if isinstance(engine, str):
            assert isinstance(plan, str), engine
        elif isinstance(plan, str):
            # A plan has no weights to ask, and engines never ask some keys, or when they load.
            assert re.search("give --dtype|must be an integer", plan), plan
        else:
            assert plan == engine

    compare()
    record_property("summary: config forms compared", len(compared))
    assert 50 < sum(compared) < len(compared) - 50


BASE = {**USUAL, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("key", sorted(RIGHT))
@pytest.mark.parametrize("value", [..., None], ids=["missing", "null"])
def test_each_default_is_transformers(kind: str, key: str, value: Any) -> None:
    """Every key alone, in a model that slides."""
    name = "Qwen3ForCausalLM" if kind == "qwen3" else "Qwen3MoeForCausalLM"
    config: dict[str, Any] = {**BASE, "model_type": kind, "architectures": [name], key: value}
    form = Form({k: v for k, v in config.items() if v is not ...}, None)
    with written(form) as model:
        engine, plan = served(model, form), planned(model, form)
    if key == "dtype":
        assert "give --dtype" in str(plan)
    elif isinstance(engine, str):
        assert isinstance(plan, str), engine
    else:
        assert plan == engine


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["DFlashDraftModel"]}, "architectures DFlashDraftModel: not served"),
        ({"architectures": ["Qwen3ForGuardModel"]}, "architectures Qwen3ForGuardModel: not served"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list of names"),
        ({"is_causal": False}, "is_causal=false"),
        ({"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config cannot"),
        ({"layer_types": [FULL] * 3}, "layer_types must be 4 names"),
        ({"num_key_value_heads": 3}, "is no multiple of num_key_value_heads=3"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_served_with_windows_is_not_planned(keys: dict[str, Any], message: str) -> None:
    form = Form({**BASE, "model_type": "qwen3", **keys}, None)
    with written(form) as model:
        assert message in str(planned(model, form))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("names", [None, [], ["Qwen3Model"]], ids=str)
def test_a_phase_is_planned_where_engines_serve_it(names: list[str] | None, phase: str) -> None:
    """Models without an answer, and those around a Qwen3, have none."""
    form = Form({**BASE, "model_type": "qwen3", "architectures": names}, None, phase)
    with written(form) as model:
        refusal = (
            "was not tested with .*, only with Qwen3ForCausalLM, .*, Qwen3NextForCausalLM, .*; rem"
        )
        assert re.search(refusal, str(planned(model, form)))
        assert re.search(refusal, str(served(model, form)))


@pytest.mark.parametrize("names", [None, [], ["Qwen3Model"], ["Qwen3ForSequenceClassification"]])
def test_what_vllm_takes_for_a_qwen3_is_planned(names: list[str] | None) -> None:
    form = Form({**BASE, "model_type": "qwen3", "architectures": names}, None)
    with written(form) as model:
        assert isinstance(planned(model, form), dict)


@pytest.mark.parametrize(
    ("keys", "flags", "told", "remedy"),
    [
        ({"sliding_window": None}, [], "Give one, such as by --window 4096,", ["--window", "64"]),
        (
            {"model_type": "qwen3_moe", "max_window_layers": 2, "layer_types": None},
            [],
            "Say which layers are full: --full-attention-layers 0-1 (or, for no layer, "
            "--full-attention-layers none)",
            ["--full-attention-layers", "0-1"],
        ),
        (
            {"use_sliding_window": False, "layer_types": None},
            ["--sink-tokens", "4"],
            "--sink-tokens would have no effect",
            ["--window", "8"],
        ),
        (
            {"use_sliding_window": False, "layer_types": None},
            ["--phase", "prefill", "--sink-tokens", "4"],
            "--phase, --sink-tokens would have no effect",
            ["--window", "8"],
        ),
    ],
    ids=["no window", "full layers of a MoE", "sinks without a window", "a phase without one"],
)
def test_errors_name_the_flags_of_this_command(
    keys: dict[str, Any],
    flags: list[str],
    told: str,
    remedy: list[str],
    tiny_model: ModelFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((tiny_model(**SLIDING_CHECKPOINT) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    planned = ["plan", str(tmp_path), "--output", "64", *flags]
    assert main(planned) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "--additional-config" not in said
    assert "swa." not in said
    assert main([*planned, *remedy]) == 0


@pytest.mark.parametrize(("chunk", "is_told"), [(512, True), (16, False)])
def test_fewer_pages_that_serve_no_more_requests_are_explained(
    chunk: int, is_told: bool, tiny_model: ModelFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long chunk makes the peak of a prompt; of long answers most steps only decode.

    A short one makes none, with one step in flight.
    """
    sizes = ["--prompt", "100", "--output", "400", "--max-num-batched-tokens", str(chunk)]
    more = ["--block-size", "16", "--max-num-seqs", "16", "--kv-memory", "1MiB", "--device", "cpu"]
    assert main(["plan", str(tiny_model(**SLIDING_CHECKPOINT)), *sizes, *more, "--json", "-"]) == 0
    printed = capsys.readouterr()
    (request,) = json.loads(printed.out)["requests"]
    stock, here = (request["arms"][name] for name in ("stock vLLM", "this plugin"))
    assert (here["peak_pages"] < stock["peak_pages"]) == is_told
    assert ("fewer pages need not mean more requests" in printed.err) == is_told, request


def _hybrid(tmp_path: Path, kind: str, **keys: Any) -> Path:
    nested = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
    text = {"model_type": nested.get(kind, kind), **keys}
    whole = {"model_type": kind, "text_config": text} if kind in nested else text
    (tmp_path / "config.json").write_text(json.dumps(whole))
    return tmp_path


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text"])
@pytest.mark.parametrize("keys", [{}, {"num_hidden_layers": 6, "full_attention_interval": 3}])
def test_layers_with_linear_attention_are_those_of_transformers(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    ours = read_checkpoint(_hybrid(tmp_path, kind, **keys))
    theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert ours.config.layer_types == theirs.layer_types
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.linear == LinearState(
        theirs.linear_num_key_heads,
        theirs.linear_num_value_heads,
        theirs.linear_key_head_dim,
        theirs.linear_value_head_dim,
        theirs.linear_conv_kernel_dim,
        None,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_state_is_as_large_as_vllm_says(seed: int) -> None:
    pick = random.Random(seed)
    size = pick.choice([1, 2, 4])
    sizes = [size * pick.randint(1, 9), size * pick.randint(1, 9), pick.choice([64, 128])]
    state = LinearState(*sizes, pick.choice([64, 128]), pick.randint(2, 5), None)
    dtypes = MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        torch.bfloat16, "auto", pick.choice(["auto", "float32"])
    )
    shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
        size,
        state.num_key_heads,
        state.num_value_heads,
        state.key_head_dim,
        state.value_head_dim,
        state.conv_kernel,
        0,
    )
    spec = MambaSpec(shapes=shapes, dtypes=dtypes, block_size=-1)
    tokens = page_size_with_states(
        state,
        block_size=1,
        token_bytes=1,
        tensor_parallel_size=size,
        model_bytes=2,
        state_bytes=dtypes[1].itemsize,
    )
    assert tokens == spec.page_size_bytes


def test_stages_beside_states_are_not_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _hybrid(tmp_path, "qwen3_next", dtype="bfloat16")
    stages = ["--pipeline-parallel-size", "2"]
    assert main(["plan", str(model), "--window", "64", *stages]) == 1
    assert "error: --pipeline-parallel-size 2 was not tested" in capsys.readouterr().err


def test_tuning_knows_no_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _hybrid(tmp_path, "qwen3_next", dtype="bfloat16")
    assert main(["tune", str(model), "--requests", "none.jsonl", "--budget", "0.5"]) == 1
    assert "linear attention, which swa tune does not know" in capsys.readouterr().err
