"""The parts of `swa tune` that need no model: requests, statistics, sizes, halving."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Qwen3Config

from swa_backend.checkpoint import read_checkpoint
from swa_backend.layers import resolve_layers
from swa_backend.options import SWAOptions
from swa_backend.window import Phase
from swa_vllm.tools.cli import main
from swa_vllm.tools.common.pools import Model
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits
from swa_vllm.tools.tune.candidates import FULL, Candidate, Layout, Objective
from swa_vllm.tools.tune.halving import rungs_of_halving, successive_halving
from swa_vllm.tools.tune.journal import Journal, Score
from swa_vllm.tools.tune.layouts import (
    counts_of_full_layers,
    layouts_to_try,
    two_windows_to_try,
    widest_window,
    windows_to_try,
)
from swa_vllm.tools.tune.paired import Rise, rise_of_loss, student_quantile
from swa_vllm.tools.tune.requests import Request, read_requests, split_requests
from swa_vllm.tools.tune.sizes import Shape, Sizer
from tests.helpers.trained_models import SLIDING

END = "[end]"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SLIDING)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


def test_prompt_and_answer_are_read(path: Path, tokenizer: Any) -> None:
    path.write_text('\n{"prompt": "In the", "answer": " beginning\u2028"}\n', encoding="utf-8")
    (request,) = read_requests(path, tokenizer, 100)
    assert (request.line, tokenizer.decode(request.prompt)) == (2, "In the")
    assert tokenizer.decode(request.answer) == " beginning\u2028"
    assert request.tokens == request.prompt + request.answer


@pytest.mark.parametrize("as_response", [False, True], ids=["messages", "choices"])
def test_chat_is_rendered_as_it_is_served(path: Path, tokenizer: Any, as_response: bool) -> None:
    """An answer ends with the token at which the model stopped."""
    asked, answer = {"role": "user", "content": "Who"}, {"role": "assistant", "content": "Paul"}
    record: dict[str, Any] = {"messages": [asked, answer]}
    if as_response:
        record = {"messages": [asked], "choices": [{"message": answer}]}
    path.write_text(json.dumps(record))
    chat = AutoTokenizer.from_pretrained(SLIDING, chat_template=TEMPLATE)
    chat.eos_token = END
    (request,) = read_requests(path, chat, 100)
    assert chat.decode(request.prompt) == "[user]Who[end]\n[assistant]"
    assert chat.decode(request.answer) == "Paul[end]"


def test_template_that_opens_thoughts_keeps_the_answer(path: Path) -> None:
    asked, answer = {"role": "user", "content": "Who"}, {"role": "assistant", "content": "Paul"}
    path.write_text(json.dumps({"messages": [asked, answer]}))
    opens = TEMPLATE.replace("[assistant]", "[assistant]<think>")
    chat = AutoTokenizer.from_pretrained(SLIDING, chat_template=opens)
    chat.eos_token = END
    (request,) = read_requests(path, chat, 100)
    assert chat.decode(request.answer) == "Paul[end]"


def _requests(prompts: list[tuple[int, ...]]) -> list[Request]:
    return [Request(line, prompt, (line,)) for line, prompt in enumerate(prompts, start=1)]


def test_half_is_held_out_and_the_same_each_time() -> None:
    requests = _requests([(n, n) for n in range(20)])
    split = split_requests(requests, 0)
    assert (len(split.choosing), len(split.held_out)) == (10, 10)
    assert {*split.choosing, *split.held_out} == {*requests}
    assert split == split_requests(requests[::-1], 0)
    assert split != split_requests(requests, 1)


def test_turns_of_a_conversation_stay_together() -> None:
    """What reports must not have been read while choosing."""
    turns = [(n, *range(100, 100 + turn)) for n in range(8) for turn in range(3)]
    split = split_requests(_requests(turns), 0)
    first = [{request.prompt[0] for request in part} for part in (split.choosing, split.held_out)]
    assert not first[0] & first[1]
    assert first[0] | first[1] == {*range(8)}


def test_rise_weighs_tokens_alike() -> None:
    rise = rise_of_loss([12.0, 33.0], [10.0, 30.0], [10, 30])
    assert rise.mean == pytest.approx(5 / 40)
    # Differences from the mean: 2 - 1.25, 3 - 3.75.
    assert rise.error == pytest.approx(math.sqrt(2 * 2 * 0.75**2) / 40)
    assert rise.high - rise.mean == pytest.approx(12.706 * rise.error)
    assert rise.mean - rise.low == pytest.approx(12.706 * rise.error)
    assert Rise(0.02, 0.0, 9).text() == "+2.02 % (+2.02 to +2.02)"


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 2000 samples of twelve requests, whose lengths differ, 95 % cover it."""
    generator, covered = random.Random(1), 0
    for _ in range(2000):
        lengths = [generator.randint(20, 200) for _ in range(12)]
        losses = [0.03 * n + generator.gauss(0, 0.05) * n for n in lengths]
        rise = rise_of_loss(losses, [0.0] * 12, lengths)
        covered += rise.low <= 0.03 <= rise.high
    assert 0.93 < covered / 2000 < 0.97


def test_other_requests_are_expected_to_spread_too() -> None:
    rise = Rise(0.01, 0.002, 9)
    assert rise.expected_high(9) == pytest.approx(0.01 + 2.306 * 0.002 * math.sqrt(2))
    assert rise.high < rise.expected_high(18) < rise.expected_high(9)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (10, 2.228), (31, 2.0395), (60, 2.0003), (10**6, 1.96)]
)
def test_quantiles_are_students(degrees: int, quantile: float) -> None:
    assert student_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


LIMITS = Limits(
    block_size=32,
    max_model_len=800,
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    num_steps_in_flight=1,
)


def sizer_of(num_layers: int = 30, memory: int | None = None) -> Sizer:
    """The demo model's sizes in fp32, behind 512 tokens of a prompt and 255 of an answer."""
    model = Model((None,) * num_layers, 0, kv_heads=3, head_dim=128, number_bytes=4)
    return Sizer(model, Shape(3_000_000, 9), LIMITS, Workload(512, 255), Device.CPU, memory=memory)


def bytes_of(sizer: Sizer, layout: Layout) -> int:
    return sizer.num_bytes(layout.with_full_layers(range(sizer.num_layers)))


PAGE = 32 * 2 * 3 * 128 * 4  # bytes of a layer's


def test_bytes_are_those_of_the_padded_pool() -> None:
    """Ten of 30 layers full are three groups of ten, one full layer of 30 is 30 groups."""
    sizer = sizer_of()
    full = sizer.gain(FULL)
    assert full.num_groups == 1
    assert full.num_bytes == (24 * 31 + 23) * 30 * PAGE // 32  # behind 736 to 767 tokens
    for num_full, num_groups in ((10, 3), (15, 2), (29, 30)):
        gain = sizer.gain(Candidate(128, 4, tuple(range(num_full))))
        assert gain.num_groups == num_groups
    # 127 tokens in four pages, or in five; the sinks; four slots ahead.
    sliding = 1 + 5 + 4 / 32 - 1 / 32
    for num_full, parts in ((0, 30 * sliding), (10, 10 * (24 + 2 * sliding))):
        candidate = Candidate(128, 4, tuple(range(num_full)))
        assert sizer.num_bytes(candidate) == pytest.approx(parts * PAGE, rel=0.02)


def test_counts_that_only_padding_explains_are_left_out() -> None:
    sizer = sizer_of()
    full = sizer.gain(FULL).num_bytes
    counts = counts_of_full_layers(sizer, Layout(128, 4, 0), full)
    by_count = [bytes_of(sizer, Layout(128, 4, count)) for count in counts]
    assert by_count == sorted(by_count, reverse=True)
    assert 29 in counts
    assert 23 not in counts  # seven layers slide at nearly the bytes of none
    assert counts_of_full_layers(sizer, Layout(128, 0, 0), full // 2)[0] == 10


def test_widest_window_fills_the_limit() -> None:
    sizer = sizer_of()
    limit = sizer.gain(FULL).num_bytes // 2
    window = widest_window(sizer, Layout(0, 4, 0), 764, limit)
    assert window % 32 == 0
    wider = Layout(window + 32, 4, 0)
    assert bytes_of(sizer, Layout(window, 4, 0)) <= limit < bytes_of(sizer, wider)
    assert widest_window(sizer, Layout(0, 4, 29), 764, limit) == 0


def test_what_is_tried_fits_and_slides() -> None:
    sizer = sizer_of()
    limit = sizer.gain(FULL).num_bytes // 2
    for by_loss in (True, False):
        layouts = layouts_to_try(sizer, (0, 4), 767, limit, by_loss=by_loss)
        assert len(layouts) == len({*layouts})
        for layout in layouts:
            assert bytes_of(sizer, layout) <= limit
            assert layout.window + layout.sinks < 767
    assert {Layout(128, 0, 0), Layout(128, 4, 0), Layout(128, 0, 10)} <= {*layouts}


def test_windows_are_half_a_doubling_apart() -> None:
    assert windows_to_try(200) == [32, 48, 64, 96, 128, 192]


def test_gains_are_of_requests_and_first_tokens() -> None:
    sizer = sizer_of()
    full, ours = sizer.gain(FULL), sizer.gain(Candidate(128, 4))
    at_once = [sizer.running(candidate) or 0.0 for candidate in (FULL, Candidate(128, 4))]
    assert 16 <= at_once[0] < 20 < 40 < at_once[1]
    assert (full.first_token, ours.first_token < 1) == (1.0, True)
    assert ours.cost(Objective.MEMORY) == ours.cost(Objective.THROUGHPUT) == ours.num_bytes
    assert ours.cost(Objective.TTFT) == ours.first_token


def test_engine_that_does_not_start_runs_nothing() -> None:
    assert sizer_of(memory=PAGE * 30).running(FULL) is None


def test_first_token_counts_products_by_hand() -> None:
    """Two layers, one of which slides over two of four tokens: 10 and 7 pairs."""
    model = Model((None,) * 2, 0, kv_heads=1, head_dim=8, number_bytes=4)
    sizer = Sizer(model, Shape(100, 4), LIMITS, Workload(4, 1), Device.CPU)
    work = [2 * 4 * 100 + 2 * 4 * 8 * pairs for pairs in (10 + 7, 10 + 10)]
    assert sizer.gain(Candidate(2, 0, (0,))).first_token == pytest.approx(work[0] / work[1])


def test_options_are_those_to_serve_with() -> None:
    assert FULL.options() == {"enabled": False}
    assert Candidate(64).options() == {"window": 64, "full_attention_layers": "none"}
    made = Layout(64, 4, 2).with_full_layers([5, 1, 3])
    assert made.options() == {"window": 64, "sink_tokens": 4, "full_attention_layers": [1, 5]}


def test_two_windows_are_spelled_by_layer() -> None:
    made = Candidate(128, 4, (2,), Phase.DECODE, (64, 64, 0, 128, 64, 128, 128))
    spelled = {"window": {"0-1,4": 64, "3,5-6": 128}, "sink_tokens": 4, "phase": "decode"}
    assert made.options() == spelled
    assert made.text() == "window 64 and 128, sinks 4, full layers 1, decode only"
    config = Qwen3Config.from_pretrained(SLIDING)
    config.num_hidden_layers, config.layer_types = 7, ["full_attention"] * 7
    plan = resolve_layers(config, SWAOptions.from_dict(made.options()))
    assert plan.windows == made.windows(7) == (64, 64, None, 128, 64, 128, 128)


def test_two_windows_take_what_the_budget_leaves() -> None:
    """The layers that are to see most get the wider one; a budget fills, or less is taken."""
    sizer = sizer_of()
    order = [7, 3, *(layer for layer in range(30) if layer not in (3, 7))]
    one = Candidate(256, 4, (3, 7))
    limit = sizer.num_bytes(one)
    pairs = two_windows_to_try(sizer, one, order, 700, limit)
    assert pairs
    for pair in pairs:
        narrow, wide = sorted({*pair.by_layer} - {0})
        assert narrow < 256 < wide == pair.window
        assert pair.full_layers == (3, 7)
        assert [pair.by_layer[layer] for layer in order[2:]] == sorted(
            (pair.by_layer[layer] for layer in order[2:]), reverse=True
        )
        wider = tuple(w + 32 if w == wide else w for w in pair.by_layer)
        assert sizer.num_bytes(pair) <= limit
        assert sizer.num_bytes(replace(pair, by_layer=wider)) > limit
    cheaper = two_windows_to_try(sizer, one, order, 700, None)
    assert {pair.window for pair in cheaper} == {256}
    assert any(sizer.num_bytes(pair) < limit for pair in cheaper)


PAIR = Candidate(128, 4, (1,), by_layer=(64, 0, 128, 128))


@pytest.mark.parametrize("one", [Candidate(64, 4, (1,)), PAIR], ids=["window", "windows"])
def test_sizes_are_those_that_swa_plan_says(one: Candidate, tmp_path: Path) -> None:
    """Of every phase."""
    path, window = tmp_path / "plan.json", one.options()["window"]
    full = [] if one.by_layer else ["--full-attention-layers", "1"]
    sizes = ["--block-size", "32", "--dtype", "float32", "--device", "cpu", "--kv-memory", "16MiB"]
    asked = ["--window", json.dumps(window), "--sink-tokens", "4", "--prompt", "256", *full]
    assert main(["plan", str(SLIDING), *asked, *sizes, "--output", "128", "--json", str(path)]) == 0
    planned = json.loads(path.read_text())["phases"]
    checkpoint = read_checkpoint(SLIDING)
    heads, dim = checkpoint.num_kv_heads, checkpoint.head_dim
    model = Model((None,) * 4, 0, kv_heads=heads, head_dim=dim, number_bytes=4)
    limits = Limits(32, 512, 8192, 256, 1)
    sizer = Sizer(model, Shape(1, 4), limits, Workload(256, 128), Device.CPU, memory=2**24)
    for phase in Phase:
        candidate = replace(one, phase=phase)
        pool, (request,) = planned[phase]["pool"], planned[phase]["requests"]
        groups = sum(group["num_groups"] for group in pool["groups"])
        assert sizer.gain(candidate).num_groups == groups
        assert sizer.running(candidate) == request["running"]
        # Bytes here are an average over where in a page the end is.
        last = request["last_pages"] * pool["page_bytes"]
        assert abs(sizer.num_bytes(candidate) - last) <= groups * pool["page_bytes"]


def test_prefill_phase_gains_time_and_no_memory() -> None:
    sizer = sizer_of()
    full = sizer.gain(FULL)
    both, prefill, decode = (
        sizer.gain(Candidate(64, 0, (3, 7), phase))
        for phase in (Phase.BOTH, Phase.PREFILL, Phase.DECODE)
    )
    assert (prefill.num_bytes, prefill.num_groups) == (full.num_bytes, 1)
    assert prefill.first_token == both.first_token < 1
    assert decode.first_token == 1
    assert both.num_bytes < decode.num_bytes < full.num_bytes


def test_layouts_of_a_phase_are_below_what_has_the_window() -> None:
    sizer = sizer_of()
    full = sizer.gain(FULL).num_bytes
    tried = {
        phase: layouts_to_try(sizer, (0, 4), sizer.longest(phase), full, by_loss=False, phase=phase)
        for phase in Phase
    }
    assert max(layout.window for layout in tried[Phase.BOTH]) > 512
    assert max(layout.window for layout in tried[Phase.PREFILL]) == 384
    assert {32, 128} <= {layout.window for layout in tried[Phase.DECODE]}
    assert max(layout.window for layout in tried[Phase.DECODE]) < 255
    assert {layout.sinks for layout in tried[Phase.DECODE]} == {0}
    assert {layout.num_full for layout in tried[Phase.PREFILL]} == {0, 10, 19, 29}
    assert not layouts_to_try(sizer, (0,), 512, full - 1, by_loss=False, phase=Phase.PREFILL)


@pytest.mark.parametrize("line", ["{oops", "[]", '{"window": 64, "sinks": 0}'])
def test_scores_of_another_version_are_refused(path: Path, line: str) -> None:
    journal, score = Journal(path, {}), Score(2.5, (3, 4))
    candidate = Candidate(128, 4, (2,), Phase.DECODE, (64, 64, 0, 128))
    journal.add(candidate, 7, score)
    assert Journal(path, {})[candidate, 7] == score
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=r"line 3 is no score .* version .*; give the path of a n"):
        Journal(path, {})


def test_rungs_halve_candidates_and_double_requests() -> None:
    assert rungs_of_halving(20, 10) == [(20, 2), (10, 4), (5, 8), (4, 10)]
    assert rungs_of_halving(8, 10) == [(8, 2), (4, 10)]
    assert rungs_of_halving(3, 10) == [(3, 10)]


def test_halving_finds_the_best_at_a_fraction_of_the_work() -> None:
    """Noise falls with the requests seen; the true values are 0 to 31."""
    generator, asked = random.Random(0), list[tuple[int, int]]()

    def measure(candidate: int, seen: int) -> float:
        asked.append((candidate, seen))
        return candidate + generator.gauss(0, 4) / math.sqrt(seen)

    def rank(scores: Mapping[int, float]) -> list[int]:
        return sorted(scores, key=lambda candidate: scores[candidate])

    found = successive_halving(range(31, -1, -1), 64, measure, rank)
    assert len(found) == 4
    assert list(found) == rank(found)
    assert next(iter(found)) <= 1
    assert sum(seen for _, seen in asked) < 32 * 64 / 3
    assert [seen for candidate, seen in asked if candidate == next(iter(found))] == [*(2, 4, 8, 64)]
