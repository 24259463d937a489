"""The table of bad inputs: each is refused with the right error, and told what to do about it.

Rows of HTTP requests meet a live server, in ``test_serve.py``.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

import swa_vllm
from swa_backend import ops
from swa_backend.checkpoint import read_checkpoint
from swa_vllm.tools.bench import overhead, prefill, sinks
from swa_vllm.tools.bench.serving.launcher import Launcher
from swa_vllm.tools.cli import main
from swa_vllm.tools.engines.scoring import ScoringEngine
from tests.bad_input.checkpoints import CHECKPOINTS, CONFIG_FILES, UNREADABLE, WEIGHTS, no_rights
from tests.bad_input.commands import COMMANDS, HERE, MODEL
from tests.bad_input.operations import OPERATIONS, arguments_of
from tests.bad_input.options import CONFIGS, ENGINES, OPTIONS
from tests.bad_input.requests import REQUESTS
from tests.bad_input.row import Bad
from tests.bad_input.surroundings import SURROUNDINGS
from tests.bad_input.traffic import SCORES, TRAFFIC, Traffic
from tests.helpers.engines import EngineFactory, ModelFactory, resolve_here
from tests.helpers.tiny_models import FULL, NUM_LAYERS, SLIDING

Record = Callable[[str, object], None]
KINDS = {
    "options": OPTIONS,
    "configs": CONFIGS,
    "engines": ENGINES,
    "checkpoints": CHECKPOINTS,
    "config files": CONFIG_FILES,
    "places": UNREADABLE,
    "surroundings": SURROUNDINGS,
    "commands": COMMANDS,
    "operations": OPERATIONS,
    "traffic": TRAFFIC,
    "requests": REQUESTS,
}


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, record_property: Record) -> None:
    """The summary at the end of a run adds these up."""
    if "row" in request.fixturenames:
        record_property("summary: bad inputs", 1)


def rows(table: list[Bad]) -> Any:
    return pytest.mark.parametrize("row", table, ids=[row.name[:60] for row in table])


@pytest.fixture(scope="module")
def without_weights(tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A directory with the tiny model's config.json, changed, and nothing else."""
    swa_vllm.register()
    resolve_here("Qwen3ForCausalLM")
    base = json.loads((tiny_model(**FULL) / "config.json").read_text())

    def make(**keys: Any) -> Path:
        config = {k: v for k, v in base.items() if k != "layer_types"} | keys
        directory = tmp_path_factory.mktemp("config")
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def set_up(model: Path, **arguments: Any) -> Any:
    """The engine's config: the process that starts an engine makes it before there is one."""
    return EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        **{"dtype": "float32", "max_model_len": 512, **arguments},
    ).create_engine_config()


def refused(row: Bad, call: Callable[[], object]) -> None:
    with pytest.raises(row.error) as caught:
        call()
    row.check(caught.value)


def test_the_table_is_a_table() -> None:
    names = [(kind, row.name) for kind, table in KINDS.items() for row in table]
    assert len(set(names)) == len(names) >= 60
    for table in KINDS.values():
        assert all(row.got and row.allowed and row.do for row in table)


@rows(OPTIONS)
def test_options(row: Bad, without_weights: Any) -> None:
    refused(row, lambda: set_up(without_weights(), additional_config=row.given))


@rows(CONFIGS)
def test_configs(row: Bad, without_weights: Any) -> None:
    refused(row, lambda: set_up(without_weights(**row.given)))


@rows(ENGINES)
def test_engines(row: Bad, without_weights: Any) -> None:
    keys, arguments = row.given
    refused(row, lambda: set_up(without_weights(**keys), **arguments))


# --- what the messages tell to do -----------------------------------------------------------------

# Options that a message spells out, with a W for a window.
SPELLED_OUT = re.compile(r"--additional-config '(\{.*?\})'(?!\w)")


def check_remedies(row: Bad, keys: dict[str, Any], arguments: dict[str, Any], make: Any) -> int:
    """Assert that what the message tells to do is served; returns how many things that are."""
    with pytest.raises(row.error) as caught:
        set_up(make(**keys), **arguments)
    options = [
        json.loads(text.replace("W", "8")) for text in SPELLED_OUT.findall(str(caught.value))
    ]
    kept = arguments
    if "leave the override out and use" in str(caught.value):
        kept = {key: value for key, value in arguments.items() if key != "hf_overrides"}
    for additional in options:
        set_up(make(**keys), **{**kept, "additional_config": additional})
    for other_keys, others in row.remedies:
        set_up(make(**other_keys), **others)
    assert options or row.remedies
    return len(options) + len(row.remedies)


@rows([*CONFIGS, *ENGINES])
def test_remedies(row: Bad, without_weights: Any, record_property: Record) -> None:
    keys, arguments = row.given if isinstance(row.given, tuple) else (row.given, {})
    num_applied = check_remedies(row, keys, arguments, without_weights)
    record_property("summary: remedies applied", num_applied)


@rows(OPTIONS)
def test_remedies_of_options(row: Bad, without_weights: Any, record_property: Record) -> None:
    fixed = tuple((FULL, {"additional_config": remedy}) for remedy in row.remedies)
    row = dataclasses.replace(row, remedies=fixed)
    given = {"additional_config": row.given}
    num_applied = check_remedies(row, FULL, given, without_weights)
    record_property("summary: remedies applied", num_applied)


def test_what_the_rows_start_from_is_served(without_weights: Any) -> None:
    """So that the rows are refused for what is wrong in them."""
    set_up(without_weights(**FULL), additional_config={"swa": {"window": 8}})
    set_up(without_weights(**SLIDING))


@rows(CHECKPOINTS)
def test_checkpoints(row: Bad, tiny_model: ModelFactory, tmp_path: Path) -> None:
    """Found in the files' headers; vLLM would serve some, and name others' modules only."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(**SLIDING), model)
    set_up(model)
    row.given(model)
    refused(row, lambda: set_up(model))


def test_vllm_itself_serves_a_checkpoint_that_lacks_a_projection(
    engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """Why headers are read. If this fails, vLLM has learned to refuse it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(**FULL), model)
    (damage,) = (row.given for row in CHECKPOINTS if row.name == "a projection is missing")
    damage(model)
    assert engine(model)


@rows(CONFIG_FILES)
def test_config_files(row: Bad, tmp_path: Path) -> None:
    """What ``swa plan`` and ``swa check`` say, which read the file themselves."""
    shutil.copy(MODEL / "config.json", tmp_path)
    row.given(tmp_path)
    refused(row, lambda: read_checkpoint(tmp_path))


@rows(SURROUNDINGS)
def test_surroundings(row: Bad, clean_registries: pytest.MonkeyPatch, without_weights: Any) -> None:
    refused(row, lambda: row.given(clean_registries, without_weights(**SLIDING)))


@rows(SURROUNDINGS)
def test_remedies_of_surroundings(
    row: Bad,
    clean_registries: pytest.MonkeyPatch,
    without_weights: Any,
    record_property: Record,
) -> None:
    for remedy in row.remedies:
        with clean_registries.context() as changes:
            remedy(changes, without_weights(**SLIDING))
    assert row.remedies
    record_property("summary: remedies applied", len(row.remedies))


@rows(UNREADABLE)
def test_places_without_rights(row: Bad, tmp_path: Path) -> None:
    with no_rights(tmp_path):
        refused(row, lambda: row.given(tmp_path))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The directory that rows of commands name."""
    (tmp_path / "short").write_text("In the")
    (tmp_path / "empty").touch()
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": None}))
    request = {"arrival": 0, "prompt_tokens": 300, "output_tokens": 4}
    (tmp_path / "trace").write_text(json.dumps(request))
    return tmp_path


def run_command(arguments: list[Any], here: Path) -> int:
    return main([str(part).replace(HERE, str(here)) for part in arguments])


@rows(COMMANDS)
def test_commands(row: Bad, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if row.error is SystemExit:  # by argparse
        with pytest.raises(SystemExit) as caught:
            run_command(row.given, here)
        assert caught.value.code == 2
    else:
        assert run_command(row.given, here) == 1
    row.check_text(capsys.readouterr().err)


class BegunError(Exception):
    """A command has taken its arguments, and would measure for long."""


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where they would start an engine, or time a layer."""

    def begin(*args: object, **kwargs: object) -> Any:
        raise BegunError

    monkeypatch.setattr(Launcher, "start", begin)
    for benchmark in (prefill, sinks, overhead):
        monkeypatch.setattr(benchmark, "make_layer", begin)
    monkeypatch.setattr(ScoringEngine, "start", begin)


@pytest.fixture(scope="module")
def followed() -> set[str]:
    """Remedies of commands that were followed: those of several rows are the same."""
    return set()


@rows([row for row in COMMANDS if row.remedies])
def test_remedies_of_commands(
    row: Bad, here: Path, cut_short: None, followed: set[str], record_property: Record
) -> None:
    for remedy in row.remedies:
        if str(remedy) not in followed:
            with contextlib.suppress(BegunError):
                assert run_command(remedy, here) == 0
            followed.add(str(remedy))
    record_property("summary: remedies applied", len(row.remedies))


def tune(given: Traffic, here: Path) -> int:
    """Run ``swa tune`` with a model of its own, for the chat template."""
    model, requests = here / "model", here / "traffic.jsonl"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(MODEL, model)
    requests.unlink(missing_ok=True)
    if given.template is not None:
        (model / "chat_template.jinja").write_text(given.template)
    if given.text is not None:
        as_bytes = given.text if isinstance(given.text, bytes) else given.text.encode()
        requests.write_bytes(as_bytes)
    for name, text in SCORES.items():
        (here / name).write_text(text)
    sizes = ["--dtype", "float32", "--block-size", "32", "--max-num-batched-tokens", "64"]
    command = ["tune", model, "--requests", requests, *sizes, *given.limit, *given.more]
    return run_command(command, here)


@rows(TRAFFIC)
def test_traffic(row: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if row.error is SystemExit:
        with pytest.raises(SystemExit):
            tune(row.given, tmp_path)
    else:
        assert tune(row.given, tmp_path) == 1
    row.check_text(capsys.readouterr().err)


@rows(TRAFFIC)
def test_remedies_of_traffic(
    row: Bad, tmp_path: Path, cut_short: None, record_property: Record
) -> None:
    """What is given instead reaches the first engine."""
    assert row.remedies
    for remedy in row.remedies:
        with pytest.raises(BegunError):
            tune(remedy, tmp_path)
    record_property("summary: remedies applied", len(row.remedies))


@rows(OPERATIONS)
def test_operations(row: Bad) -> None:
    name, changes = row.given
    refused(row, lambda: getattr(ops, name)(**arguments_of(name) | changes))


def test_stacked_projections_are_not_missing(tiny_model: ModelFactory, tmp_path: Path) -> None:
    """A checkpoint may have them in one, which vLLM loads too."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(**SLIDING), model)
    tensors = load_file(model / WEIGHTS)
    for layer in range(NUM_LAYERS):
        for stack, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            place = f"model.layers.{layer}.{stack.partition('.')[0]}"
            taken = [tensors.pop(f"{place}.{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{stack}_proj.weight"] = torch.cat(taken)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    set_up(model)


def test_an_adapter_that_is_moved_away_is_in_nobodys_way(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """And vLLM leaves one alone that an index of the weights does not name."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(**SLIDING), model)
    (damage,) = (row.given for row in CHECKPOINTS if row.name == "an adapter beside the weights")
    damage(model)
    index = model / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)}))
    set_up(model)
    index.unlink()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (model / file).rename(tmp_path / file)
    set_up(model)
