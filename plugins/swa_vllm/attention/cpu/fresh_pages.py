"""Pages that begin in a step, where layers of another kind may have left their state in them.

vLLM's C++ attention multiplies what it masks by zero, which a NaN survives, so no slot of a page
may hold one before it is written. vLLM's CPU runner clears new pages of full attention only.
"""

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.pages import ceil_div


def fresh_pages(
    batch: CommonAttentionMetadata, block_size: int, num_ahead_tokens: int
) -> torch.Tensor:
    """Pages whose first slot is written in this step, or may be, int64 ``[n]``.

    Args:
        batch: ``block_table_tensor`` int32 ``[num_reqs, max_pages]``, ``seq_lens`` int32
            ``[num_reqs]`` and ``query_start_loc`` int32 ``[num_reqs + 1]``, all on the CPU.
        block_size: tokens a page.
        num_ahead_tokens: slots behind a request's last token that are written too.
    """
    ends = batch.seq_lens.numpy()[: batch.num_reqs]
    starts = ends - np.diff(batch.query_start_loc.numpy()[: batch.num_reqs + 1])
    table = batch.block_table_tensor.numpy()
    pages = [
        table[row, ceil_div(int(start), block_size) : ceil_div(int(end) + ahead, block_size)]
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
        for ahead in (num_ahead_tokens if end > start else 0,)
    ]
    found = np.unique(np.concatenate(pages)).astype(np.int64)
    return torch.from_numpy(found[found > 0])  # page 0 stands for holes
