"""KV cache specs: kinds, groups, merged and padded."""

import pickle
from dataclasses import replace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    KVCacheSpec,
    KVCacheSpecKind,
    UniformTypeKVCacheSpecs,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from swa_backend.options import PrefillPages
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec
from tests.helpers.start_up import unify_page_sizes
from tests.plugin.upstream.pages import AUTO, full_spec, stock_spec, windowed_spec


def test_spec_is_a_sliding_window_with_a_manager_and_a_kind_of_its_own() -> None:
    spec = windowed_spec(128, 16, AUTO)
    assert KVCacheSpecRegistry.get_manager_class(spec) is SWAManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is SWASpec
    assert get_kv_cache_spec_kind(spec) is KVCacheSpecKind.SLIDING_WINDOW
    assert get_kv_cache_spec_sliding_window(spec) == 128
    assert get_kv_cache_spec_sliding_window(_together(spec, replace(spec, num_kv_heads=2))) == 128
    assert get_kv_cache_spec_sliding_window(_together(spec, windowed_spec(256, 16, AUTO))) is None


def _together(*specs: KVCacheSpec) -> UniformTypeKVCacheSpecs:
    named = {str(i): spec for i, spec in enumerate(specs)}
    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=named)


@pytest.mark.parametrize(
    ("other", "is_uniform"),
    [
        (windowed_spec(128, 16), True),
        (windowed_spec(128, 16, num_kv_heads=2), True),
        (windowed_spec(256, 16), False),
        (windowed_spec(128, 32), False),
        (windowed_spec(128, 16, sink_tokens=4), False),
        (windowed_spec(128, 16, spare_tokens=4), False),
        (windowed_spec(128, 16, PrefillPages.SURVIVORS), False),
        (full_spec(16), False),
    ],
)
def test_layers_share_a_group_only_with_the_same_pages(
    other: KVCacheSpec, is_uniform: bool
) -> None:
    spec = windowed_spec(128, 16)
    for pair in ((spec, other), (other, spec)):
        named = {str(i): spec for i, spec in enumerate(pair)}
        assert UniformTypeKVCacheSpecs.is_uniform_type(named) is is_uniform


def test_a_drafts_stock_layer_has_a_group_of_its_own() -> None:
    """vLLM asks the first layer, which is the target's."""
    named = {"target": windowed_spec(128, 16), "draft": stock_spec(128, 16)}
    assert not UniformTypeKVCacheSpecs.is_uniform_type(named)


def test_equal_specs_merge_and_others_do_not() -> None:
    spec = windowed_spec(128, 16, AUTO, sink_tokens=4)
    assert spec.merge([spec, replace(spec)]) == spec
    for other in (windowed_spec(128, 16, AUTO), replace(spec, num_kv_heads=2), full_spec(16)):
        with pytest.raises((AssertionError, ValueError)):
            spec.merge([spec, other])


def test_spec_reaches_the_engine_core_as_it_is() -> None:
    """Workers send it pickled; vLLM groups layers by its hash."""
    spec = windowed_spec(128, 16, AUTO, sink_tokens=4, spare_tokens=4)
    sent = pickle.loads(pickle.dumps(spec))  # noqa: S301 (made here)
    assert sent == spec
    assert hash(sent) == hash(spec)
    assert sent.storage == StoragePolicy(4, 4, AUTO)


def test_smaller_pages_are_padded_and_stay_ours() -> None:
    target = full_spec(16, head_size=192, dtype=torch.bfloat16)
    sliding = windowed_spec(1024, 16, AUTO, head_size=128, dtype=torch.bfloat16, sink_tokens=4)
    unified = unify_page_sizes({"target": target, "sliding": sliding})
    assert unified["target"] == target
    assert unified["sliding"] == replace(sliding, page_size_padded=target.page_size_bytes)
