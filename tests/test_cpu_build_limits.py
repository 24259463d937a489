"""What vLLM's CPU build itself refuses or gets wrong, so that the README may say so."""

import pytest
import torch
from vllm.lora.ops.torch_ops import bgmv_shrink
from vllm.platforms import current_platform

from conftest import EngineFactory, ModelFactory
from tiny_models import MIXED


@pytest.mark.skipif(not current_platform.is_cpu(), reason="this vLLM is not the CPU build")
def test_sleep_mode(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine(tiny_model(**MIXED), enable_sleep_mode=True)


def test_a_request_without_adapter_gets_the_one_of_its_batch() -> None:
    """vLLM marks it by -1, which to its CPU operators is the last adapter."""
    inputs, weights = torch.ones(2, 4), torch.ones(1, 3, 4)
    output = torch.zeros(2, 3)
    bgmv_shrink(inputs, weights, output, torch.tensor([0, -1]))
    assert output.tolist() == [[4.0] * 3] * 2
