"""Rows of Model Runner V2's block tables, as a step's kernels get them."""

import pytest
import torch
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tests.plugin.upstream.pages import POLICIES, stock_spec, windowed_spec

pytestmark = pytest.mark.only_on("0.33/V2")


def test_entries_below_a_window_are_nulled_in_stock_groups_and_kept_in_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row has sinks below its window; what lies between is read by no kernel of ours."""
    from vllm.v1.worker.cpu import buffer_utils as on_host
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.block_table import BlockTables

    monkeypatch.setattr(buffer_utils, "UvaBuffer", on_host.UvaBuffer)  # there is no pinned memory
    ours = [windowed_spec(32, 16, policy, sink_tokens=4) for policy in POLICIES]
    specs: list[SlidingWindowSpec] = [stock_spec(32, 16), *ours]
    tables = BlockTables(
        block_sizes=[16] * len(specs),
        max_num_reqs=4,
        max_num_batched_tokens=64,
        max_num_blocks_per_group=[16] * len(specs),
        device=torch.device("cpu"),
        sliding_window_reach=[spec.num_retained_tokens for spec in specs],
    )
    rows = {0: list(range(21, 33)), 2: list(range(61, 73))}
    for slot, row in rows.items():
        tables.append_block_ids(slot, (row,) * len(specs), overwrite=True)
    tables.apply_staged_writes()
    stock, *kept = tables.gather_block_tables(
        torch.tensor(list(rows), dtype=torch.int32),
        num_reqs_padded=3,
        num_computed_tokens=torch.tensor([145, 0, 120, 0], dtype=torch.int32),
    )
    # The first keys that are seen: 145 - 31 = 114, in page 7, and 120 - 31 = 89, in page 5.
    nulled = [[0] * 7 + rows[0][7:], [0] * 5 + rows[2][5:]]
    for table, expected in ((stock, nulled), *((table, list(rows.values())) for table in kept)):
        assert table[:2, :12].tolist() == expected
        assert not table[2].any()
