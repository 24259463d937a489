"""The arms that are compared wherever pages are counted."""

from enum import StrEnum


class Arm(StrEnum):
    """An arm: who manages the pages. The value is its name in tables and figures."""

    FULL = "full attention"
    STOCK = "stock vLLM"
    SWA = "this plugin"
