"""Why a page may be handed out while a step in flight reads it, held against vLLM's sources.

Whoever takes the page writes it in a later step, and a worker runs its steps in order. That holds
while vLLM writes pages nowhere but within a step and on its stream, which a KV connector does not;
and what is scheduled is never computed again, but for drafts and the end of a session's turn.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import SLIDING
from tests.helpers.wheel_sources import official_sources
from tests.plugin.upstream.pages import stock_spec

RUNNERS = {
    "v1/worker/gpu_model_runner.py": "_update_states",
    "v1/worker/gpu/model_runner.py": "update_requests",
}
SCHEDULERS = "v1/core/sched"


@pytest.fixture(params=["installed", "0.33.0"])
def tree(request: pytest.FixtureRequest) -> Path:
    """Root of a ``vllm`` package's Python files."""
    if request.param == "installed":
        return Path(vllm.__file__).parent
    return official_sources(request.param)


@cache
def _functions(path: Path) -> tuple[ast.FunctionDef, ...]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return tuple(node for node in nodes if isinstance(node, ast.FunctionDef))


def _functions_named(path: Path, name: str) -> list[ast.FunctionDef]:
    found = [function for function in _functions(path) if function.name == name]
    assert found, f"{path.name} no longer defines {name}"
    return found


def _attributes(node: ast.AST) -> set[str]:
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _names(node: ast.AST) -> set[str]:
    return _attributes(node) | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _files(root: Path) -> Iterator[Path]:
    yield from sorted(root.rglob("*.py"))


@pytest.mark.parametrize("field", ["new_block_ids_to_zero", "kv_cache_block_copies"])
def test_new_pages_are_cleared_and_copied_by_the_step_that_takes_them(
    field: str, tree: Path
) -> None:
    """Both runners do it as they take in what is scheduled, and nobody else does."""
    writers = {
        (str(path.relative_to(tree)), function.name)
        for path in _files(tree / "v1" / "worker")
        if field in path.read_text()
        for function in _functions(path)
        if field in _attributes(function)
    }
    assert writers == set(RUNNERS.items())
    for file, update in RUNNERS.items():
        (execute,) = _functions_named(tree / file, "execute_model")
        assert update in _names(execute)


def test_pages_are_written_on_the_stream_of_the_forward_pass(tree: Path) -> None:
    writers = [
        (file, name) for file, update in RUNNERS.items() for name in (update, "execute_model")
    ]
    writers += [
        ("v1/worker/gpu_model_runner.py", "_zero_block_ids"),
        ("v1/worker/gpu_model_runner.py", "_model_forward"),
        ("v1/worker/utils.py", "zero_block_ids"),
        ("v1/worker/utils.py", "copy_kv_cache_blocks_inplace"),
    ]
    for file, writer in writers:
        for function in _functions_named(tree / file, writer):
            names = _names(function)
            streams = {n for n in names if n in ("stream", "Stream") or n.endswith("_stream")}
            assert not streams, f"{file}: {writer}"


def test_vllm_itself_keeps_pages_from_connectors_until_steps_in_flight_have_run(
    tree: Path,
) -> None:
    """Why pages are not freed by what is scheduled there."""
    (init, *_) = (
        f
        for f in _functions_named(tree / SCHEDULERS / "scheduler.py", "__init__")
        if "defer_block_free" in _names(f)
    )
    guards = [
        ast.unparse(node.test)
        for node in ast.walk(init)
        if isinstance(node, ast.If)
        and any("self.defer_block_free = True" in ast.unparse(line) for line in node.body)
    ]
    assert "multiple_inflight_batches and kv_transfer_config.is_kv_consumer" in guards


def test_what_is_scheduled_is_computed_again_in_known_cases_only(tree: Path) -> None:
    """Whoever sets back a request's computed tokens, but those who free its pages as well."""
    setters = {
        function.name
        for path in _files(tree / SCHEDULERS)
        for function in _functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and target.attr == "num_computed_tokens"
    }
    going_on = {"schedule", "_update_after_schedule"}
    without_pages = {"_preempt_request"}
    drafts = {"update_from_output", "_update_request_with_output"}
    end_of_turn = {"_handle_stopped_request"}
    connectors = {
        "_update_waiting_for_remote_kv",
        "_update_requests_with_invalid_blocks",
        "_handle_failed_recving",
    }
    assert setters <= going_on | without_pages | drafts | end_of_turn | connectors
    assert end_of_turn <= setters


def test_with_a_connector_pages_are_freed_by_what_is_settled(tiny_model: ModelFactory) -> None:
    config = EngineArgs(
        str(tiny_model(**SLIDING)),
        skip_tokenizer_init=True,
        dtype="float32",
        kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_both"},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True
    spec = SWASpec.from_stock(stock_spec(40, 16), config, StoragePolicy())
    assert (spec.num_steps_in_flight, spec.frees_by_schedule, spec.rollback_tokens) == (2, False, 0)
