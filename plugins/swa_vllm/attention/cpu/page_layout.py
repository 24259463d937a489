"""How vLLM's C++ operators arrange the elements of a token within a page.

They pack keys and values for the processor at hand, in ways that are nowhere documented, and no
operator reads a page back. What we need to know is asked of the operator that writes pages.
"""

from collections.abc import Callable

import torch

# Stores keys and values ``[n, num_kv_heads, head_size]`` in pages ``[num_pages, num_kv_heads,
# block_size, 2 * head_size]`` at slots int64 ``[n]``.
WriteTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class PageLayout:
    """Places of each token's elements in pages of one shape.

    Attributes:
        page_shape: ``(num_kv_heads, block_size, 2 * head_size)``.
    """

    def __init__(self, page_shape: tuple[int, int, int], dtype: torch.dtype, write: WriteTokens):
        """Learn the layout by writing tokens that spell the index of each of their elements.

        Raises:
            RuntimeError: the operator does not just move what it is given.
        """
        self.page_shape = page_shape
        num_heads, block_size, token_size = page_shape
        # Element ``i`` of a head's part of a page, in order of tokens; each token's key, then its
        # value. Written bit by bit, because 0 and 1 are exact in every dtype.
        indices = torch.arange(block_size * token_size).view(block_size, 1, token_size)
        found = torch.zeros(block_size * token_size, dtype=torch.int64)
        for bit in range(indices.numel().bit_length()):
            page = torch.zeros(1, *page_shape, dtype=dtype)
            digits = (indices >> bit & 1).expand(-1, num_heads, -1).to(dtype)
            key, value = (half.contiguous() for half in digits.chunk(2, dim=2))
            write(key, value, page, torch.arange(block_size))
            heads = page.view(num_heads, -1) != 0
            if not (heads == heads[0]).all():
                raise RuntimeError(_UNKNOWN)
            found += heads[0].long() << bit
        if not torch.equal(found.sort().values, indices.flatten()):
            raise RuntimeError(_UNKNOWN)
        self._offsets = found.argsort().view(block_size, token_size)

    def elements(self, slots: torch.Tensor) -> torch.Tensor:
        """Indices of the elements of some tokens in the flat pages.

        Args:
            slots: int64 ``[n]``.

        Returns:
            int64 ``[n, num_kv_heads, 2 * head_size]``: each token's key, then its value.
        """
        num_heads, block_size, token_size = self.page_shape
        heads = torch.arange(num_heads)[:, None] + (slots // block_size * num_heads)[:, None, None]
        return heads * (block_size * token_size) + self._offsets[slots % block_size][:, None]

    def read_tokens(
        self, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value ``[n, num_kv_heads, head_size]`` of the tokens at ``slots``."""
        key, value = pages.view(-1)[self.elements(slots)].chunk(2, dim=-1)
        return key, value


_UNKNOWN = (
    "vLLM's CPU operators store keys and values in a way that sink tokens cannot follow on this "
    "processor; serve without sink_tokens"
)
