"""`swa eval stream`: many trained lengths in one request, half of them decoded."""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from swa_backend.pages import WindowPages, ceil_div, max_pages_spanned
from swa_vllm.tools.cli import main
from swa_vllm.tools.engines.forced import ForcedTokens
from swa_vllm.tools.engines.perplexity import perplexity
from swa_vllm.tools.engines.scoring import Scored, ScoringEngine
from swa_vllm.tools.engines.setup import scoring_text_config
from swa_vllm.tools.eval.stream import (
    Stream,
    StreamOutcome,
    make_stream,
    stream_arms_of,
    summarize_stream,
)
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import DenseText
from tests.helpers.engines import EngineFactory
from tests.helpers.tiny_models import PAGE_SIZE
from tests.helpers.trained_models import NUM_LAYERS, SLIDING, TEXT, text_tokens

TRAINED = 512  # of the model
WINDOW, SINKS = 64, 4
# What a token of the model's last layer sees, through all layers.
REACH = NUM_LAYERS * (WINDOW - 1)


@cache
def dense() -> DenseText:
    return DenseText(SLIDING, torch.float32)


@pytest.fixture(params=["5", pytest.param("33", marks=pytest.mark.full)], scope="module")
def stream(request: pytest.FixtureRequest) -> Stream:
    return make_stream(text_tokens(), int(request.param) * TRAINED, TRAINED)


def serve(stream: Stream, engine: EngineFactory, *, shift: bool) -> tuple[Scored, StreamOutcome]:
    options = {"window": WINDOW, "sink_tokens": SINKS, "position_shift": shift}
    llm = engine(
        SLIDING,
        max_model_len=len(stream.tokens) + 1,
        hf_overrides={"max_position_embeddings": len(stream.tokens) + 1},
        enable_prefix_caching=False,
        logits_processors=[ForcedTokens],
        # NaN in free pages is tested elsewhere; at each of so many steps it is slow.
        additional_config={"swa": {**options, "debug_poison": False}},
    )
    scored = ScoringEngine(llm).score(stream.tokens, stream.num_decoded)
    return scored, summarize_stream(stream, scored)


@pytest.fixture(scope="module")
def shifted(stream: Stream, engine: EngineFactory) -> tuple[Scored, StreamOutcome]:
    return serve(stream, engine, shift=True)


def recompute(stream: Stream, bucket: range, *, shift: bool) -> float:
    """Perplexity of a bucket by a dense model, of the sinks and what the bucket can see."""
    first = max(bucket.start - 1 - REACH, 0)
    positions = [*range(min(SINKS, first)), *range(first, bucket.stop)]
    seen = Sight((WINDOW,) * NUM_LAYERS, SINKS, shift)
    tokens = [stream.tokens[position] for position in positions]
    logprobs = dense().logprobs(tokens, positions, seen)
    return perplexity(logprobs[-len(bucket) :].tolist())


def buckets(stream: Stream) -> list[range]:
    return [range(max(1, i), i + TRAINED) for i in range(0, len(stream.tokens), TRAINED)]


def check_buckets(stream: Stream, outcome: StreamOutcome, *, shift: bool) -> None:
    expected = [recompute(stream, bucket, shift=shift) for bucket in buckets(stream)]
    assert outcome.perplexities == pytest.approx(expected, rel=1e-3)


def test_each_bucket_is_a_dense_recompute(
    stream: Stream, shifted: tuple[Scored, StreamOutcome]
) -> None:
    check_buckets(stream, shifted[1], shift=True)


def test_a_passage_far_beyond_the_trained_length_costs_the_same(
    shifted: tuple[Scored, StreamOutcome],
) -> None:
    near, far = shifted[1].passages
    assert far == pytest.approx(near, rel=0.05)


def test_half_of_the_stream_is_decoded_in_constant_pages(
    stream: Stream, shifted: tuple[Scored, StreamOutcome]
) -> None:
    scored, outcome = shifted
    half = len(stream.tokens) // 2
    assert stream.num_decoded == half
    # The prompt's last step, and one for each token but the last two: one is never computed, and
    # the other's step ends the request.
    assert scored.computed[-half + 1 :] == list(range(half, len(stream.tokens) - 1))
    pages = WindowPages(WINDOW, PAGE_SIZE, sink_tokens=SINKS)
    most = pages.num_sink_pages + pages.max_survivors + 1  # a page for copies of the sinks
    decoded = outcome.most_pages[-(len(outcome.most_pages) // 2) :]
    assert len(set(decoded)) == 1
    assert outcome.decode_pages[1] == decoded[0] <= most


@pytest.mark.full
def test_each_bucket_is_a_dense_recompute_without_shift(engine: EngineFactory) -> None:
    stream = make_stream(text_tokens(), 33 * TRAINED, TRAINED)
    check_buckets(stream, serve(stream, engine, shift=False)[1], shift=False)


def test_stream_ends_as_it_began() -> None:
    stream = make_stream(range(100), 250, trained=40)
    assert stream.tokens == [*range(100), *range(100), *range(10), *range(40)]
    near, far = ([stream.tokens[i] for i in passage] for passage in stream.passages)
    assert near == far == list(range(20, 40))
    assert (stream.num_decoded, stream.bucket) == (125, 40)


def test_rows_are_no_more_than_a_page() -> None:
    assert make_stream(range(100), 100 * 40, trained=40).bucket == 3 * 40


def test_pages_of_a_bucket_without_a_step_are_the_next_steps() -> None:
    stream = Stream(list(range(13)), trained=4, bucket=2, num_decoded=4)
    scored = Scored([-1.0] * 12, pages=[5, 4, 3], computed=[9, 10, 11], greedy=[0] * 12)
    outcome = summarize_stream(stream, scored)
    assert outcome.most_pages == [5, 5, 5, 5, 5, 3, 3]
    assert outcome.least_pages == [5, 5, 5, 5, 4, 3, 3]
    assert outcome.decode_pages == (3, 4)


@pytest.mark.parametrize(
    ("phase", "option"), [("both", {}), ("prefill", {"phase": "prefill"})], ids=["both", "prefill"]
)
def test_arms_are_options(phase: str, option: dict[str, str]) -> None:
    args = argparse.Namespace(
        window=64,
        sink_tokens=4,
        full_attention_layers="3",
        phase=phase,
        arms="shifted,sinks,window,full",
    )
    window = {"window": 64, "full_attention_layers": "3", **option}
    assert stream_arms_of(args, scoring_text_config(str(SLIDING))) == {
        "shifted": {**window, "sink_tokens": 4, "position_shift": True},
        "sinks": {**window, "sink_tokens": 4},
        "window": window,
        "full": {"enabled": False},
    }


def test_command_streams_made_up_prose(
    no_engine: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_engine()
    path = tmp_path / "stream.json"
    command = ["eval", "stream", str(SLIDING), "--tokens", "1024", "--window", "64", "--json"]
    sizes = ["--arms", "window", "--dtype", "float32", "--block-size", "32"]
    assert main([*command, str(path), *sizes]) == 0
    result = json.loads(path.read_text())
    assert (result["tokens"], result["decoded"], result["trained_length"]) == (1024, 512, 512)
    window = result["arms"]["window"]
    assert window["options"] == {"window": 64}
    # The text comes again as it was, and nothing is seen of what lies before it.
    near, far = window["passages"]
    assert far == pytest.approx(near, rel=1e-3)
    assert window["decode_pages"] == [2, 3]
    printed = capsys.readouterr().out
    assert "1024 tokens, 2.0 times the trained length of 512; decoded from 512 on" in printed
    assert "the same passage at 0.5x and 1.5x the trained length" in printed


def test_command_decodes_with_the_prompt_beside_the_window(
    no_engine: Callable[[], None], tmp_path: Path
) -> None:
    no_engine()
    path = tmp_path / "stream.json"
    command = ["eval", "stream", str(SLIDING), "--tokens", "1024", "--window", "64", "--json"]
    sizes = ["--arms", "window", "--dtype", "float32", "--block-size", "32"]
    assert main([*command, str(path), *sizes, "--text", str(TEXT), "--phase", "decode"]) == 0
    window = json.loads(path.read_text())["arms"]["window"]
    stream = make_stream(text_tokens(), 1024, TRAINED)
    seen = Sight((64,) * NUM_LAYERS, phase="decode", prompt_len=512)
    logprobs = dense().logprobs(stream.tokens, range(1024), seen)
    expected = [perplexity(logprobs[b.start - 1 : b.stop - 1].tolist()) for b in buckets(stream)]
    assert window["perplexities"] == pytest.approx(expected, rel=1e-3)
    # Behind the prompt's 16 pages those of a window, and of 62 slots behind the newest token.
    least, most = window["decode_pages"]
    assert least == 512 // 32 + ceil_div(1 + 62, 32)
    assert most == 512 // 32 + max_pages_spanned(64 + 62, 32)


def test_command_decodes_without_the_window_of_the_prompt(
    no_engine: Callable[[], None], tmp_path: Path
) -> None:
    no_engine()
    path, text = tmp_path / "stream.json", text_tokens()
    command = ["eval", "stream", str(SLIDING), "--tokens", "1024", "--window", "64", "--json"]
    sizes = ["--arms", "shifted,window", "--dtype", "float32", "--block-size", "32"]
    assert main([*command, str(path), *sizes, "--text", str(TEXT), "--phase", "prefill"]) == 0
    arms = json.loads(path.read_text())["arms"]
    stream = make_stream(text, 1024, TRAINED)
    for name, sinks, shift in (("shifted", SINKS, True), ("window", 0, False)):
        seen = Sight((WINDOW,) * NUM_LAYERS, sinks, shift, "prefill", prompt_len=512)
        logprobs = dense().logprobs(stream.tokens, range(1024), seen)
        expected = [
            perplexity(logprobs[b.start - 1 : b.stop - 1].tolist()) for b in buckets(stream)
        ]
        assert arms[name]["perplexities"] == pytest.approx(expected, rel=1e-3)
        # Of the first step that stores a generated token, and of the last: every page stays.
        assert arms[name]["decode_pages"] == [512 // 32 + 1, 1024 // 32]
