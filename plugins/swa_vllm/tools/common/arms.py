"""The arms of every comparison of pages: who manages them."""

from enum import StrEnum


class Arm(StrEnum):
    """Who manages the pages; the value is the arm's name in tables and figures."""

    FULL = "full attention"
    STOCK = "stock vLLM"
    SWA = "this plugin"
