"""vLLM's own suites of schedulers and KV caches, with this plugin's spec in the place of its own.

They are not in vLLM's wheels: README.md says where they come from.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import OPTConfig, PreTrainedTokenizerFast, Qwen3Config

from swa_backend.options import PrefillPages
from swa_vllm.config.storage import StoragePolicy
from tests.helpers.processes import probe_command, probe_environment
from tests.plugin.upstream.pages import POLICIES

VERSION = metadata.version("vllm").partition("+")[0]
SOURCES = Path(os.environ.get("SWA_VLLM_SOURCES", ".cache/vllm-sources")) / f"vllm-{VERSION}"
SCHEDULERS = (
    *("test_async_scheduler", "test_deferred_block_free", "test_prefix_replay", "test_scheduler"),
)
KV_CACHES = (
    *("test_contiguous_kv_packing", "test_kv_cache_config_builder", "test_kv_cache_planning"),
    *("test_kv_cache_utils", "test_prefix_caching", "test_single_type_kv_cache_manager"),
    *("test_swa_inflight_window_free", "prefix_cache/test_partial_prefix_cache_hits"),
)
WINDOW = 64  # of every scheduler
OPT = OPTConfig(architectures=["OPTForCausalLM"])
QWEN3 = Qwen3Config(architectures=["Qwen3ForCausalLM"])
MODELS = {"facebook/opt-125m": OPT, "Qwen/Qwen3-0.6B": QWEN3, "Qwen/Qwen1.5-7B": QWEN3}
# What the engine does not do with this plugin's spec and manager.
NOT_OURS = {
    # Fills the manager's table behind its back, where ours frees what it has counted.
    "test_sliding_window_remove_skipped_blocks",
    # One group for all layers, where layers have vLLM's own spec.
    "test_get_kv_cache_config_one_worker",
    "test_unify_hybrid_kv_cache_specs",
}
# A hit that ends before the prompt does, of which survivors have no page (0.33).
NOT_SURVIVING = {
    "test_prefix_hit_is_capped_at_retained_auxiliary_outputs[local-sliding-window-truncated]"
}

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (SOURCES / "tests").is_dir(),
        reason=f"no {SOURCES}/tests: unpack vLLM's source distribution there, or say by "
        "SWA_VLLM_SOURCES in which directory it is",
    ),
]


Run = Callable[[tuple[str, ...], StoragePolicy | None], tuple[int, set[str]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs suites with a storage policy, or as they are: how many tests, and which failed."""
    directory = tmp_path_factory.mktemp("suites")
    (directory / "tests").symlink_to((SOURCES / "tests").resolve())
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))  # noqa: S106 (no password)
    for name, config in MODELS.items():  # which the suites would get from the network
        config.save_pretrained(directory / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory / name)

    @cache
    def run(suites: tuple[str, ...], policy: StoragePolicy | None) -> tuple[int, set[str]]:
        files = [f"tests/v1/core/{suite}.py" for suite in suites]
        asked = {
            "directory": str(directory),
            "files": [file for file in files if (directory / file).exists()],
            "window": WINDOW,
            "policy": None if policy is None else asdict(policy),
        }
        done = subprocess.run(
            [*probe_command("upstream_suites"), json.dumps(asked)],
            env={**probe_environment(), "VLLM_PLUGINS": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        return found["num_run"], set(found["failed"])

    return run


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sinks", [0, 4])
def test_schedulers_do_what_they_do_with_vllms_spec(
    sinks: int, policy: PrefillPages, run: Run
) -> None:
    """Without spare tokens: pools of theirs that are just large enough would be too small."""
    num_stock, failed_with_stock = run(SCHEDULERS, None)
    num_run, failed = run(SCHEDULERS, StoragePolicy(sinks, 0, policy))
    assert num_run == num_stock > 200
    allowed = NOT_SURVIVING if policy is PrefillPages.SURVIVORS else set()
    assert {name.rpartition("::")[2] for name in failed - failed_with_stock} <= allowed


def test_kv_caches_are_vllms_where_all_pages_are_stored(run: Run) -> None:
    """Those of sinks and survivors are others by definition."""
    num_stock, failed_with_stock = run(KV_CACHES, None)
    num_run, failed = run(KV_CACHES, StoragePolicy())
    assert num_run == num_stock > 400
    assert {name.rpartition("::")[2] for name in failed - failed_with_stock} == NOT_OURS
