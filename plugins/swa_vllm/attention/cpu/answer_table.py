"""Block tables of answers whose window has left the prompt, for decoding on CPUs.

With a window in generated tokens only, such a token sees the whole prompt and the window. vLLM's
C++ attention sees one unbroken run of pages, full but for the last. Attention of one query does not
care for the order of keys, so the row names the prompt's whole pages, then the window's, the newest
one last; what is left, the head of the window and the end of the prompt, is copied behind the
newest token. The head comes first: each next token then takes the place of the one that leaves the
window, and nothing has to be copied again until the window leaves a page.
"""

from collections.abc import Mapping

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.pages import ceil_div
from swa_vllm.attention.cpu.batches import copy_batch


def answer_tables(
    batch: CommonAttentionMetadata,
    rows: np.ndarray,
    prompt_lens: np.ndarray,
    window: int,
    block_size: int,
    ends_before: Mapping[int, int],
) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor, dict[int, int]]:
    """Give ``rows`` of a batch tables of nothing but what their queries see.

    Args:
        batch: ``block_table_tensor`` int32 ``[num_reqs, max_pages]`` with
            :func:`swa_backend.pages.max_partial_tokens` slots behind each of the rows' last tokens,
            ``seq_lens`` int32 ``[num_reqs]``, on the CPU.
        rows: int64 ``[n]``, requests of one query each, whose window begins behind the prompt.
        prompt_lens: int64 ``[n]``, of theirs.
        window: tokens such a query sees beside the prompt, itself included.
        block_size: tokens a page.
        ends_before: the last value returned for the step before, which was executed. Its keys name
            pages of answers, which nobody shares and nobody else has had since.

    Returns:
        The batch; the slots of the KV cache, int64 ``[m]`` each, to copy tokens from and to; and
        for the next step the lengths of these requests by the page of their newest token.
    """
    table, ends = batch.block_table_tensor.numpy().copy(), batch.seq_lens.numpy().copy()
    sources, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    ends_now = {}
    for row, prompt_len in zip(rows.tolist(), prompt_lens.tolist(), strict=True):
        pages, end = table[row].copy(), int(ends[row])
        num_whole, first = prompt_len // block_size, end - window
        # The first page that the window has from its first token on; it may have none.
        page = ceil_div(first, block_size)
        boundary = page * block_size
        ends_now[int(pages[(end - 1) // block_size])] = end
        is_next = ends_before.get(int(pages[(end - 2) // block_size])) == end - 1
        # One token's place further on all lies where it lay, unless the window was in a whole page.
        if not (is_next and boundary < end and (first - 1) % block_size):
            copied = np.r_[first : min(boundary, end), num_whole * block_size : prompt_len]
            places = max(boundary, end) + np.arange(len(copied))
            sources.append(pages[copied // block_size] * block_size + copied % block_size)
            targets.append(pages[places // block_size] * block_size + places % block_size)
        ends[row] = prompt_len + window
        num_pages = ceil_div(prompt_len + window, block_size)
        table[row, num_whole:num_pages] = pages[page : page + num_pages - num_whole]
    longer = copy_batch(
        batch,
        block_table_tensor=torch.from_numpy(table),
        seq_lens=torch.from_numpy(ends),
        max_seq_len=int(ends.max()),
    )
    copies = (torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (sources, targets))
    return longer, *copies, ends_now
