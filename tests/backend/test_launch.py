"""A launch past Triton's binder runs the kernel that Triton compiled for such arguments.

In a process where Triton does not interpret: kernels are really compiled, and what is launched is
compared with what it was compiled for.
"""

import json
import os
import subprocess
from typing import Any

import pytest
import torch

from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.device import target_of
from swa_backend.ops.cache_write import WriteBatch
from swa_backend.ops.decode import DecodeBatch
from swa_backend.ops.prefill import PrefillBatch
from tests.helpers.processes import probe_command, probe_environment

CPU = torch.device("cpu")


def test_no_kernel_runs_on_arguments_of_another_kind() -> None:
    """Queries, keys and caches of several dtypes, layouts and beginnings; tables begin anywhere."""
    environment = probe_environment()
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        probe_command("launches"), env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kernels"] == ["decode_kernel", "merge_kernel", "write_kernel"]
    assert found["misfits"] == []
    (num_launches, num_bound), (num_again, num_bound_again) = found["rounds"]
    assert num_launches == num_again == 80
    # The second time nothing is new: not even the tables, which begin elsewhere each time.
    assert 0 < num_bound < num_launches / 2
    assert num_bound_again == 0
    assert "TRITON_INTERPRET" in os.environ


@pytest.fixture
def call() -> AttentionCall:
    """A batch of two requests; of query and cache only what a plan needs."""
    return AttentionCall(
        query=torch.empty(2, 4, 16, device="meta"),
        kv_cache=torch.empty(1, 2, 16, 32, device="meta"),
        block_table=torch.zeros(2, 1).int(),
        seq_lens=torch.ones(2).int(),
        query_start_loc=torch.tensor([0, 1, 2]).int(),
        window=8,
        sink_tokens=0,
        scale=None,
        sink_query=None,
        k_scale=1.0,
        v_scale=1.0,
    )


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_prepared_batch_refuses_other_tokens(num_tokens: int, call: AttentionCall) -> None:
    query, key = torch.zeros(num_tokens, 4, 16), torch.zeros(num_tokens, 2, 16)
    cache, good = torch.zeros(1, 2, 16, 32), torch.zeros(2, 4, 16)
    message = rf"the batch has (2 tokens|queries .2, 4, 16.), got float32 \[{num_tokens}, 4, 16\]"
    for batch, own in (
        (DecodeBatch(call, target_of(CPU)), ()),
        (PrefillBatch(call, target_of(CPU)), (key, key)),
    ):
        attend: Any = batch.attend
        for first, out in ((query, good), (good, query)):
            keys = own if first is query else tuple(x[:1].expand(2, 2, 16) for x in own)
            with pytest.raises(ValueError, match=message):
                attend(first, *keys, cache, out)


def test_prepared_slots_refuse_fewer_tokens() -> None:
    key, cache = torch.zeros(2, 2, 16), torch.zeros(1, 2, 16, 32)
    writes = WriteBatch(torch.arange(2), key, cache, target_of(CPU))
    writes.write(key, key, cache)
    for pair in ((key[:1], key), (key, key[:1])):
        with pytest.raises(ValueError, match="got 1 tokens for 2 slots"):
            writes.write(*pair, cache)
