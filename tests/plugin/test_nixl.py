"""What servers compare before they exchange pages; two of them do in ``test_transfer.py``."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from swa_vllm.distributed.nixl import describe_pages, describe_rope

# Of each KV group its layers, window and tokens a page.
Groups = tuple[tuple[list[int], int | None, int], ...]
MIXED: Groups = (([0, 1, 10], 64, 32), ([2, 3], None, 32))


def _described(groups: Groups) -> str:
    found = []
    for layers, window, page_size in groups:
        common: dict[str, Any] = {
            "block_size": page_size,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        spec = (
            SlidingWindowSpec(**common, sliding_window=window)
            if window
            else FullAttentionSpec(**common)
        )
        found.append(KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn" for i in layers], spec))
    return describe_pages(KVCacheConfig(1, [], found))


def test_windows_and_pages_are_said_by_layer_whatever_their_group() -> None:
    assert _described(MIXED) == (
        "layers 0-1: window 64, pages of 32; layers 2-3: full, pages of 32; "
        "layer 10: window 64, pages of 32"
    )
    assert _described((([3, 2], None, 32), ([10], 64, 32), ([1, 0], 64, 32))) == _described(MIXED)


@pytest.mark.parametrize(
    "other",
    [
        (([0, 1, 10], 63, 32), ([2, 3], None, 32)),
        (([0, 1, 10], 64, 16), ([2, 3], None, 16)),
        (([0, 2, 10], 64, 32), ([1, 3], None, 32)),
        (([0, 1, 2, 3, 10], 64, 32),),
    ],
    ids=["window", "page size", "which layers", "no full layer"],
)
def test_what_differs_is_told_apart(other: Groups) -> None:
    assert _described(other) != _described(MIXED)


def test_rope_is_compared() -> None:
    def described(**rope: object) -> str:
        config = Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6, **rope})
        return describe_rope(SimpleNamespace(hf_text_config=config))  # type: ignore[arg-type]

    assert described() == described()
    yarn = described(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert len({described(), described(rope_theta=1e4), yarn}) == 3
