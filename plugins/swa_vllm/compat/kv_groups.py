"""How vLLM divides layers into KV groups, which share a block table each."""

from collections.abc import Sequence


def split_into_kv_groups(num_layers: Sequence[int]) -> tuple[int, list[int]]:
    """Split the layers of each kind into groups of one size, as vLLM does.

    Args:
        num_layers: of each kind, at least one.

    Returns:
        Layers of a group, and groups of each kind.
    """
    fewest, most = min(num_layers), max(num_layers)
    size = most if most < 1.5 * fewest else fewest
    return size, [-(-number // size) for number in num_layers]
