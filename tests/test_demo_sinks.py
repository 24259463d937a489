"""What sink tokens do for a checkpoint that was trained with full attention, on real weights."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from conftest import EngineFactory
from consistency import DATA, perplexity
from swa_backend.reference import visible_mask

NUM_TOKENS = 1024
WINDOW = 128


@cache
def _text(model: Path) -> list[int]:
    text = (DATA / "acts-1-7.txt").read_text(encoding="utf-8")
    return list(AutoTokenizer.from_pretrained(model)(text)["input_ids"][:NUM_TOKENS])


@cache
def _expected(model: Path, window: int | None, sinks: int) -> float:
    """Hugging Face's perplexity in fp32 under a dense mask."""
    torch.manual_seed(0)
    oracle = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens, positions = torch.tensor([_text(model)]), torch.arange(NUM_TOKENS)
    mask = visible_mask(positions, positions, window, sinks)[None, None]
    masks = {"full_attention": mask, "sliding_attention": mask}
    with torch.inference_mode():
        logits = oracle(tokens, attention_mask=masks).logits[0, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


@pytest.mark.parametrize(
    ("sinks", "dtype", "tolerance"),
    [(0, "float32", 1e-4), (4, "float32", 1e-4), (4, "bfloat16", 5e-3)],
)
def test_perplexity_is_the_dense_models(
    sinks: int, dtype: str, tolerance: float, demo_model: dict[str, Path], engine: EngineFactory
) -> None:
    model = demo_model["full"]
    llm = engine(
        model,
        dtype=dtype,
        max_model_len=NUM_TOKENS + 1,
        max_num_batched_tokens=300,
        additional_config={"swa": {"window": WINDOW, "sink_tokens": sinks}},
    )
    expected = _expected(model, WINDOW, sinks)
    assert perplexity(llm, [_text(model)]) == pytest.approx(expected, rel=tolerance)


def test_sinks_keep_the_sense_of_a_stock_checkpoint(demo_model: dict[str, Path]) -> None:
    full, plain, sinks = (
        _expected(demo_model["full"], window, sinks)
        for window, sinks in ((None, 0), (WINDOW, 0), (WINDOW, 4))
    )
    assert plain > 2 * full
    assert sinks < 1.2 * full
