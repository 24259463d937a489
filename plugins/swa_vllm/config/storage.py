"""What windowed layers store beside the pages of their windows."""

from dataclasses import dataclass

from swa_backend.options import PrefillPages


@dataclass(frozen=True)
class StoragePolicy:
    """The decisions that the engine core's page managers follow.

    Attributes:
        sink_tokens: leading tokens that every query sees.
        spare_tokens: slots behind the newest token that the attention backend writes to.
        prefill_pages: which pages of a prefill chunk are stored.
    """

    sink_tokens: int = 0
    spare_tokens: int = 0
    prefill_pages: PrefillPages = PrefillPages.ALL
