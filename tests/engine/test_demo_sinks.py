"""What sink tokens do for a checkpoint that was trained with full attention, on real weights."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from swa_vllm.tools.engines.perplexity import perplexity
from swa_vllm.tools.engines.scoring import NUM_EXTRA_TOKENS, ScoringEngine
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.engines import EngineFactory
from tests.helpers.paths import DATA
from tests.helpers.runners import RUNNER

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        RUNNER == "0.33/V2",
        reason="takes prompt logprobs by a kernel of vLLM's, in the interpreter longer than a test "
        "may",
    ),
]

WINDOW, LENGTH = 128, 1024
# Of each text, the first log-probability that counts; they begin with the second token's. The
# openings are texts on which a plain window is over four times worse; they count from where it
# slides on. They have 3448 tokens that count, as bfloat16 moves the perplexity of a few hundred by
# over 0.5 % on some processors.
COUNTS_FROM = {"acts": 0, "openings": WINDOW}


@cache
def _texts(model: Path, name: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if name == "acts":
        texts = [(DATA / "acts-1-7.txt").read_text(encoding="utf-8")]
    else:
        texts = (DATA / "openings.txt").read_text(encoding="utf-8").split("\n\n")
    return [list(tokenizer(text)["input_ids"][:LENGTH]) for text in texts]


def _perplexity(model: Path, name: str, logprobs: Callable[[list[int]], Sequence[float]]) -> float:
    """Of all that counts in texts which are scored one by one."""
    texts, start = _texts(model, name), COUNTS_FROM[name]
    return perplexity([score for text in texts for score in logprobs(text)[start:]])


@cache
def _dense(model: Path) -> DenseText:
    return DenseText(model, torch.float32)


@cache
def _expected(model: Path, name: str, window: int | None, sinks: int) -> float:
    """Dense and in fp32."""
    dense = _dense(model)
    sight = Sight((window,) * dense.num_layers, sinks)
    return _perplexity(
        model, name, lambda text: dense.logprobs(text, range(len(text)), sight).tolist()
    )


@pytest.mark.parametrize(
    ("name", "sinks", "dtype", "tolerance"),
    [
        ("acts", 4, "float32", 1e-4),
        pytest.param("openings", 0, "float32", 1e-4, marks=pytest.mark.full),
        pytest.param("openings", 4, "bfloat16", 5e-3, marks=pytest.mark.full),
    ],
)
def test_perplexity_is_the_dense_models(
    name: str,
    sinks: int,
    dtype: str,
    tolerance: float,
    demo_model: dict[str, Path],
    engine: EngineFactory,
) -> None:
    model = demo_model["full"]
    llm = engine(
        model,
        dtype=dtype,
        max_model_len=LENGTH + NUM_EXTRA_TOKENS,
        max_num_batched_tokens=300,
        additional_config={"swa": {"window": WINDOW, "sink_tokens": sinks}},
    )
    served = _perplexity(model, name, lambda text: ScoringEngine(llm).score(text).logprobs)
    assert served == pytest.approx(_expected(model, name, WINDOW, sinks), rel=tolerance)


@pytest.mark.parametrize(
    ("name", "documented", "loss"),
    [
        ("acts", (21.4, 58.0, 23.4), 2),
        pytest.param("openings", (16.3, 73.4, 18.3), 4, marks=pytest.mark.full),
    ],
)
def test_sinks_keep_the_sense_of_a_stock_checkpoint(
    name: str, documented: tuple[float, ...], loss: float, demo_model: dict[str, Path]
) -> None:
    """examples/README.md: where a plain window is over four times worse, sinks are within 20 %."""
    full, plain, sinks = (
        _expected(demo_model["full"], name, window, sinks)
        for window, sinks in ((None, 0), (WINDOW, 0), (WINDOW, 4))
    )
    assert (full, plain, sinks) == pytest.approx(documented, abs=0.05)
    assert plain > loss * full
    assert sinks < 1.2 * full
