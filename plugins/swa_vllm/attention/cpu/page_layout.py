"""How vLLM's C++ operators arrange the elements of a token within a page.

They pack keys and values for the processor at hand, in ways that are nowhere documented, and no
operator reads a page back. What we need to know is asked of the operator that writes pages.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
            RuntimeError: the operator does not just move what it is given, or not evenly.
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
        keys, values = found.argsort().view(block_size, token_size).chunk(2, dim=1)
        self._keys, self._values = _Places.of_offsets(keys), _Places.of_offsets(values)

    def read_tokens(
        self, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value ``[n, num_kv_heads, head_size]`` of the tokens at ``slots``.

        Args:
            pages: ``[num_pages, num_kv_heads, block_size, 2 * head_size]``.
            slots: int64 ``[n]``.
        """
        return self._keys.read(pages, slots), self._values.read(pages, slots)

    def write_tokens(
        self, pages: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write what :meth:`read_tokens` reads."""
        self._keys.write(pages, slots, key)
        self._values.write(pages, slots, value)


@dataclass(frozen=True)
class _Steps:
    """Places in two nested loops: ``num_outer`` times ``num_inner`` of them.

    Attributes:
        outer, inner: elements from one place to the next.
    """

    num_outer: int
    num_inner: int
    outer: int
    inner: int

    @classmethod
    def of_offsets(cls, offsets: torch.Tensor) -> "_Steps":
        """Find the loops; places that are in no such order are other places in these."""
        inner = int(offsets[1] - offsets[0]) if len(offsets) > 1 else 0
        jumps = (offsets.diff() != inner).nonzero()
        num_inner = int(jumps[0]) + 1 if len(jumps) else len(offsets)
        outer = int(offsets[num_inner] - offsets[0]) if len(jumps) else 0
        return cls(len(offsets) // num_inner, num_inner, outer, inner)

    def places(self) -> torch.Tensor:
        """Offsets of all places from the first, int64."""
        outer, inner = torch.arange(self.num_outer), torch.arange(self.num_inner)
        return (outer[:, None] * self.outer + inner * self.inner).flatten()


@dataclass(frozen=True)
class _Places:
    """Where the keys, or the values, of a head's tokens are in its part of a page.

    Attributes:
        first: of the first token's first element.
        tokens: from token to token.
        elements: from element to element of a token.
    """

    first: int
    tokens: _Steps
    elements: _Steps

    @classmethod
    def of_offsets(cls, offsets: torch.Tensor) -> "_Places":
        """Find the order of int64 ``[block_size, head_size]``.

        Raises:
            RuntimeError: there is none, or none of two nested loops.
        """
        places = cls(
            int(offsets[0, 0]), _Steps.of_offsets(offsets[:, 0]), _Steps.of_offsets(offsets[0])
        )
        of_tokens, of_elements = places.tokens.places(), places.elements.places()
        loops = places.tokens, places.elements
        goes_back = any(step < 0 for steps in loops for step in (steps.outer, steps.inner))
        if goes_back or not torch.equal(places.first + of_tokens[:, None] + of_elements, offsets):
            raise RuntimeError(_UNKNOWN)
        return places

    def read(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``[n, num_kv_heads, head_size]``, of the tokens at ``slots``."""
        return self._view(pages)[self._index(slots)].flatten(2)

    def write(self, pages: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
        elements = self.elements
        self._view(pages)[self._index(slots)] = states.view(
            *states.shape[:2], elements.num_outer, elements.num_inner
        )

    def _view(self, pages: torch.Tensor) -> torch.Tensor:
        """See pages as ``[num_pages, num_kv_heads, *tokens, *elements]``, both in two loops."""
        assert pages.stride()[2:] == (pages.shape[3], 1)
        loops = self.tokens, self.elements
        sizes = [size for steps in loops for size in (steps.num_outer, steps.num_inner)]
        strides = [stride for steps in loops for stride in (steps.outer, steps.inner)]
        return pages.as_strided(
            (*pages.shape[:2], *sizes),
            (*pages.stride()[:2], *strides),
            pages.storage_offset() + self.first,
        )

    def _index(self, slots: torch.Tensor) -> tuple[torch.Tensor | slice, ...]:
        tokens = self.tokens
        token = slots % (tokens.num_outer * tokens.num_inner)
        page = slots // (tokens.num_outer * tokens.num_inner)
        return page, slice(None), token // tokens.num_inner, token % tokens.num_inner


_UNKNOWN = (
    "vLLM's CPU operators store keys and values in a way that this plugin does not know on this "
    'processor; serve without sink_tokens and without swa.phase="decode"'
)
