"""What vLLM's CPU build itself refuses, so that the README may call it not executed."""

import pytest
from vllm.platforms import current_platform

from conftest import EngineFactory, ModelFactory
from tiny_models import MIXED


@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_sleep_mode(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine(tiny_model(**MIXED), enable_sleep_mode=True)
