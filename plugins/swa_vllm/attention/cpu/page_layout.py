"""How vLLM's C++ operators arrange the elements of a token within a page.

They pack keys and values for the processor at hand, in ways that are nowhere documented, and no
operator reads a page back. What we need to know is asked of the operator that writes pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

# Stores keys and values ``[n, num_kv_heads, head_size]`` in pages ``[num_pages, num_kv_heads,
# block_size, 2 * head_size]`` at slots int64 ``[n]``.
WriteTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
Index = tuple[torch.Tensor | slice, ...]
# Where the keys of some tokens are, and their values.
Located = tuple[Index, Index]


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

    def locate(self, slots: torch.Tensor) -> Located:
        """Find the tokens at ``slots``, int64 ``[n]``, in pages of any layer: once for a step."""
        return self._keys.index(slots), self._values.index(slots)

    def read(self, pages: torch.Tensor, tokens: Located) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value ``[n, num_kv_heads, head_size]`` of some tokens.

        Args:
            pages: ``[num_pages, num_kv_heads, block_size, 2 * head_size]``.
        """
        keys, values = tokens
        return self._keys.read(pages, keys), self._values.read(pages, values)

    def write(
        self, pages: torch.Tensor, tokens: Located, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write what :meth:`read` reads."""
        keys, values = tokens
        self._keys.write(pages, keys, key)
        self._values.write(pages, values, value)

    def read_tokens(
        self, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`read`, of the tokens at ``slots``, int64 ``[n]``."""
        return self.read(pages, self.locate(slots))


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

    def index(self, slots: torch.Tensor) -> Index:
        """Index of the tokens at ``slots`` in the view of any pages."""
        tokens = self.tokens
        token = slots % (tokens.num_outer * tokens.num_inner)
        page = slots // (tokens.num_outer * tokens.num_inner)
        loops = [(tokens.num_outer, token // tokens.num_inner)]
        loops += [(tokens.num_inner, token % tokens.num_inner)]
        return page, slice(None), *(place for size, place in loops if size > 1)

    def read(self, pages: torch.Tensor, index: Index) -> torch.Tensor:
        """``[n, num_kv_heads, head_size]``, of the tokens at ``index``."""
        return self._view(pages)[index].flatten(2)

    def write(self, pages: torch.Tensor, index: Index, states: torch.Tensor) -> None:
        """Write what :meth:`read` reads."""
        view = self._view(pages)
        view[index] = states.view(*states.shape[:2], *view.shape[-2:])

    def _view(self, pages: torch.Tensor) -> torch.Tensor:
        """See pages as ``[num_pages, num_kv_heads, *tokens, *elements]``, both in their loops."""
        num_pages, num_heads, _, token_size = pages.shape
        of_page, of_head, *inside = pages.stride()
        assert inside == [token_size, 1]
        sizes, strides = self._loops
        return pages.as_strided(
            (num_pages, num_heads, *sizes),
            (of_page, of_head, *strides),
            pages.storage_offset() + self.first,
        )

    @cached_property
    def _loops(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides. A loop of one token is left out: each dimension costs in an index."""
        tokens, elements = self.tokens, self.elements
        loops = [(tokens.num_outer, tokens.outer), (tokens.num_inner, tokens.inner)]
        loops = [(size, stride) for size, stride in loops if size > 1]
        loops += [(elements.num_outer, elements.outer), (elements.num_inner, elements.inner)]
        sizes, strides = zip(*loops, strict=True)
        return sizes, strides


_UNKNOWN = (
    "vLLM's CPU operators store keys and values in a way that this plugin does not know on this "
    'processor; serve without sink_tokens and without swa.phase="decode"'
)
