"""xformers behind ``prefill_attention``: its masks over what we gather say what the oracle says.

Its operators need a GPU; here its own dense form of the mask takes their place.
"""

import platform
from typing import Any

import pytest
import torch

from swa_backend import ops, reference
from tests.helpers.kernels.prefill_cases import PrefillCase, make_inputs

if platform.machine() != "x86_64":
    pytest.skip("xformers has wheels for x86_64 only", allow_module_level=True)

from xformers.ops import fmha

CASES = (
    PrefillCase(
        window=17, chunks=((20, 30), (0, 3), (5, 1), (0, 0)), num_kv_heads=2, num_padding=2
    ),
    PrefillCase(window=50, chunks=((90, 40), (-3, 3)), group=5, page=32),
    PrefillCase(window=1, chunks=((9, 4),), group=4),
    PrefillCase(window=None, chunks=((40, 9), (0, 7)), by_token=True),
    PrefillCase(window=32, chunks=((50, 8),), kv_dtype=torch.float8_e4m3fn),
)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: Any, scale: float
) -> torch.Tensor:
    bias = attn_bias.materialize((query.shape[1], key.shape[1]), dtype=query.dtype)
    scores = torch.einsum("bqhgd,bkhgd->bhgqk", query, key) * scale + bias
    return torch.einsum("bhgqk,bkhgd->bqhgd", scores.softmax(-1), value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathered_window_under_xformers_mask_equals_the_oracle(
    case: PrefillCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", _dense)
    inputs = make_inputs(case, tmp_path)
    expected = reference.prefill_attention(
        inputs.args[0].double(), *inputs.args[1:], **inputs.kwargs
    )
    got = ops.prefill_attention(*inputs.args, **inputs.kwargs, impl="xformers")
    assert float((got.double() - expected).abs().max()) <= inputs.tolerance


def test_sinks_are_refused_by_name(tmp_path: Any) -> None:
    inputs = make_inputs(PrefillCase(window=8, chunks=((0, 3),), sink_tokens=4), tmp_path)
    with pytest.raises(ValueError, match="xformers has no mask with sinks, got sink_tokens=4; use"):
        ops.prefill_attention(*inputs.args, **inputs.kwargs, impl="xformers")


def test_without_a_gpu_xformers_says_so_itself(tmp_path: Any) -> None:
    inputs = make_inputs(PrefillCase(window=8, chunks=((0, 3),)), tmp_path)
    with pytest.raises(NotImplementedError, match="No operator found"):
        ops.prefill_attention(*inputs.args, **inputs.kwargs, impl="xformers")
