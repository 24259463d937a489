"""Every KV cache dtype that vLLM lets a user choose is served with a window, or refused by name."""

from typing import Any, get_args

import pytest
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import EngineArgs

import swa_vllm
from swa_backend.options import SWAConfigError
from swa_vllm.compat.cache_dtypes import FP8, UNQUANTIZED
from swa_vllm.config.implementation import FP8_DTYPES
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL

# Decided one by one: whoever adds one says what windowed layers do with it.
REFUSED = {
    *("fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla"),
    *("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"),
    *("octave_k3v4", "octave_k3v3", "octave_k3v3_compact", "ultraquant_4bit"),  # 0.33 has octave's
    *("int4_per_token_head", "int8_per_token_head", "fp8_per_token_head"),
    *("nvfp4", "nvfp4_4over6"),
}
CHOICES = get_args(CacheDType)


def test_every_choice_is_decided() -> None:
    assert set(CHOICES) - {*UNQUANTIZED, *FP8} <= REFUSED
    assert {*UNQUANTIZED, *FP8} <= set(CHOICES)
    assert tuple(FP8_DTYPES) == FP8


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("sinks", [0, 4], ids=["window", "sinks"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_served_or_refused_by_name(
    choice: str, sinks: int, impl: str, tiny_model: ModelFactory
) -> None:
    """On a CPU: "auto" is vLLM's operators, "triton" the kernels, which know fp8 beside sinks."""
    swa_vllm.register()
    options: dict[str, Any] = {"window": 8, "sink_tokens": sinks, "impl": impl}
    config = EngineArgs(
        str(tiny_model(**FULL)), skip_tokenizer_init=True, additional_config={"swa": options}
    ).create_engine_config()
    config.cache_config.cache_dtype = choice
    served = choice in UNQUANTIZED or (choice in FP8 and (not sinks or impl == "triton"))
    if served:
        check_servable(config, SWAConfig.from_vllm(config))
    else:
        with pytest.raises(SWAConfigError, match=rf"kv_cache_dtype={choice}\b.*use --kv-cache"):
            check_servable(config, SWAConfig.from_vllm(config))
