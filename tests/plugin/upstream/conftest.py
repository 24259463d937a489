"""The plugin is registered, and vLLM's page hashes have a beginning."""

import pytest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

import swa_vllm


@pytest.fixture(autouse=True)
def _registered() -> None:
    swa_vllm.register()
    init_none_hash(sha256)
