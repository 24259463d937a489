"""Run vLLM's own tests of schedulers and KV caches.

The argument is JSON: the directory that they lie in; their files; the window that every scheduler
of theirs gets; and whose spec stands for a sliding window, which is a storage policy's fields for
this plugin's, and null for vLLM's.

The last line printed is JSON: how many tests ran, and the names of those that failed.
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from vllm.v1.core import single_type_kv_cache_manager as managers
from vllm.v1.kv_cache_interface import SlidingWindowSpec

import swa_vllm
from swa_backend.options import PrefillPages
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec


class Outcomes:
    """How many tests have run, and what failed."""

    def __init__(self) -> None:
        self.num_run = 0
        self.failed: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.num_run += report.when == "setup" and not report.skipped
        if report.failed:
            self.failed.add(report.nodeid)


class InPlaceOfStock:
    """What vLLM's tests take for its spec and manager of sliding windows is this plugin's."""

    def __init__(self, policy: StoragePolicy) -> None:
        @dataclass(frozen=True, kw_only=True)
        class Spec(SWASpec):
            storage: StoragePolicy = policy

        self.spec = Spec
        swa_vllm.register()
        managers.SlidingWindowManager = SWAManager
        # Done by now; once more it would find another manager of vLLM's spec.
        managers.register_all_kvcache_specs = lambda vllm_config: None

    def pytest_collection_finish(self) -> None:
        for name, module in sys.modules.items():
            if name.startswith("tests.") and "SlidingWindowSpec" in vars(module):
                vars(module)["SlidingWindowSpec"] = self.spec


def slide_schedulers(window: int) -> None:
    """Give the schedulers of vLLM's tests a window, where a test does not say what it needs."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this project's, from which this module came
    sys.path.insert(0, os.getcwd())
    utils: Any = import_module("tests.v1.core.utils")
    create = utils.create_scheduler

    def create_sliding(
        *args: Any, block_size: int = 16, kv_cache_spec: Any = None, **kwargs: Any
    ) -> Any:
        sizes = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
        spec = kv_cache_spec or utils.SlidingWindowSpec(
            block_size=block_size, sliding_window=window, **sizes
        )
        return create(*args, block_size=block_size, kv_cache_spec=spec, **kwargs)

    utils.create_scheduler = create_sliding
    utils.SlidingWindowSpec = SlidingWindowSpec


def main() -> None:
    asked = json.loads(sys.argv[1])
    os.chdir(asked["directory"])
    plugins: list[Any] = [outcomes := Outcomes()]
    if policy := asked["policy"]:
        pages = PrefillPages(policy["prefill_pages"])
        plugins.append(InPlaceOfStock(StoragePolicy(**{**policy, "prefill_pages": pages})))
    slide_schedulers(asked["window"])
    options = ["-q", "--tb=line", "--noconftest", "-p", "no:cacheprovider"]
    pytest.main([*options, "--continue-on-collection-errors", *asked["files"]], plugins=plugins)
    print(json.dumps({"num_run": outcomes.num_run, "failed": sorted(outcomes.failed)}))


if __name__ == "__main__":
    main()
