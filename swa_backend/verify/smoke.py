"""A smoke test: one small batch of each kernel, run here, against the oracle.

``python -m swa_backend.verify.smoke`` does it in this process's Triton, on a GPU where there is
one; on a CPU it needs ``TRITON_INTERPRET=1``.
"""

import torch

from swa_backend import ops, reference
from swa_backend.pages import ceil_div

# Not a multiple of the page, so that both ends of the window lie within one.
_WINDOW, _SINKS, _PAGE, _NUM_KV_HEADS, _GROUP, _HEAD_DIM = 40, 4, 16, 2, 4, 128
_LENGTHS = (1, 39, 130)
_CHUNK = 50


def smoke(device: torch.device) -> float:
    """Write, decode and prefill in bfloat16 on ``device``, and compare with the oracle.

    Returns:
        The largest error of an output, in units of the rounding of bfloat16 at that output's scale.

    Raises:
        RuntimeError: an output is not the oracle's.
        ValueError: no kernel runs there.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    pages = [ceil_div(length, _PAGE) for length in _LENGTHS]
    table = torch.zeros(len(_LENGTHS), max(pages), dtype=torch.int32)
    first = 1
    for row, count in enumerate(pages):
        table[row, :count] = torch.arange(first, first + count)
        first += count
    cache = torch.zeros(
        first, _NUM_KV_HEADS, _PAGE, 2 * _HEAD_DIM, dtype=torch.bfloat16, device=device
    )
    slots = torch.cat(
        [
            table[row, torch.arange(length) // _PAGE].long() * _PAGE + torch.arange(length) % _PAGE
            for row, length in enumerate(_LENGTHS)
        ]
    ).to(device)
    key, value = (random(len(slots), _NUM_KV_HEADS, _HEAD_DIM) for _ in range(2))
    expected = cache.clone().cpu()
    reference.write_pages(key.cpu(), value.cpu(), expected, slots.cpu())
    ops.write_pages(key, value, cache, slots, impl="triton")
    if not torch.equal(cache.cpu(), expected):
        raise RuntimeError("the kernel that writes pages does not write what the oracle does")
    table, lengths = table.to(device), torch.tensor(_LENGTHS, dtype=torch.int32, device=device)
    return max(
        _smoke_decode(
            random(len(_LENGTHS), _NUM_KV_HEADS * _GROUP, _HEAD_DIM), cache, table, lengths
        ),
        _smoke_prefill(
            random(_CHUNK, _NUM_KV_HEADS * _GROUP, _HEAD_DIM),
            random(_CHUNK, _NUM_KV_HEADS, _HEAD_DIM),
            random(_CHUNK, _NUM_KV_HEADS, _HEAD_DIM),
            cache,
            table[-1:],
        ),
    )


def _smoke_decode(
    query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> float:
    found = ops.decode_attention(
        query, cache, table, lengths, window=_WINDOW, sink_tokens=_SINKS, impl="triton"
    )
    exact = reference.decode_attention(
        query.cpu().double(),
        cache.cpu(),
        table.cpu(),
        lengths.cpu(),
        window=_WINDOW,
        sink_tokens=_SINKS,
    )
    return _error_in_roundings("decode", found, exact)


def _smoke_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
) -> float:
    """Prefill a chunk in place of the longest request's last tokens; returns its error."""
    starts = torch.tensor([0, _CHUNK], dtype=torch.int32, device=query.device)
    lengths = torch.tensor([_LENGTHS[-1]], dtype=torch.int32, device=query.device)
    inputs = (cache, table, starts, lengths)
    found = ops.prefill_attention(
        query, key, value, *inputs, window=_WINDOW, sink_tokens=_SINKS, impl="triton"
    )
    exact = reference.prefill_attention(
        *(x.cpu().double() for x in (query, key, value)),
        *(x.cpu() for x in inputs),
        window=_WINDOW,
        sink_tokens=_SINKS,
    )
    return _error_in_roundings("prefill", found, exact)


def _error_in_roundings(kernel: str, found: torch.Tensor, exact: torch.Tensor) -> float:
    """Give the error in roundings of bfloat16 at the largest output; weights are rounded too."""
    unit = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    error = float((found.cpu().double() - exact).abs().max()) / unit
    if not error <= 2.0:
        raise RuntimeError(
            f"the {kernel} kernel differs from the oracle by {error:.1f} roundings of bfloat16; "
            "at most 2 are expected"
        )
    return error


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    print(f"{smoke(torch.device('cuda' if gpu else 'cpu')):.2f}")
