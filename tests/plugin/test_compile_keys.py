"""No kernel is compiled while the engine serves: the builder has compiled all that can be launched.

Counted by the keys by which Triton tells compiled kernels apart, in a process where it does not
interpret.
"""

import json
import os
import subprocess
from typing import Any

import pytest

from tests.helpers.engines import ModelFactory
from tests.helpers.processes import probe_command, probe_environment
from tests.helpers.tiny_models import FULL


@pytest.fixture(scope="module")
def count_keys(tiny_model: ModelFactory) -> Any:
    def count(num_batches: int, *specialized: str) -> dict[str, dict[str, Any]]:
        environment = probe_environment()
        environment.pop("TRITON_INTERPRET", None)
        command = [*probe_command("compile_keys"), str(tiny_model(**FULL)), str(num_batches)]
        result = subprocess.run(
            [*command, *specialized], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    assert "TRITON_INTERPRET" in os.environ
    return count


def test_serving_compiles_nothing(count_keys: Any) -> None:
    """Nor is anything compiled for nothing: each kernel is launched by one of these batches."""
    found = count_keys(400)
    assert len(found) == 9
    assert {name: counts["late"] for name, counts in found.items() if counts["late"]} == {}
    assert {name: counts["unused"] for name, counts in found.items() if counts["unused"]} == {}
    assert all(counts["before"] >= 3 for counts in found.values())


@pytest.mark.parametrize(
    ("parameter", "kernel"),
    [
        ("num_reqs", "decode_kernel"),
        ("seq_lens_ptr", "prefill_kernel"),
    ],
)
def test_a_kernel_that_depends_on_the_batch_is_seen(
    parameter: str, kernel: str, count_keys: Any
) -> None:
    found = count_keys(25, parameter)
    assert kernel in {name for counts in found.values() for name in counts["late"]}
