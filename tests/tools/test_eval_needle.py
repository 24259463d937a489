"""`swa eval needle`: prompts that mention a number once, and what is recalled of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swa_backend.window import Phase
from swa_vllm.tools.cli import main
from swa_vllm.tools.engines.needles import Needle, make_needles
from swa_vllm.tools.engines.texts import tokenizer_of
from swa_vllm.tools.eval.needle import describe_recall
from tests.helpers.trained_models import SLIDING


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of(str(SLIDING))


@pytest.fixture(scope="module")
def needles(tokenizer: Any) -> list[Needle]:
    return make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), [200, 400], 3, 2
    )


def test_prompts_ask_for_a_number_that_they_mention_once(
    needles: list[Needle], tokenizer: Any
) -> None:
    assert [(n.length, n.depth) for n in needles] == [
        (length, depth) for length in (200, 400) for depth in (0.0, 0.5, 1.0) for _ in range(2)
    ]
    for needle in needles:
        prompt = tokenizer.decode(needle.tokens)
        question = prompt[prompt.rindex(" The secret number of") :]
        assert prompt.count(f"{question} {needle.number}.") == 1
        assert prompt.count(needle.number) == 1
        assert needle.length - 30 < len(needle.tokens) <= needle.length


def test_distance_is_from_the_number_to_the_answer(needles: list[Needle], tokenizer: Any) -> None:
    for needle in needles:
        text = tokenizer.decode(needle.tokens[-needle.distance :])
        assert text.strip().startswith(needle.number)
    at_start, _, in_the_middle, _, at_end, _ = (needle.distance for needle in needles[:6])
    assert at_start > in_the_middle > at_end
    assert 200 - at_start < 40 > at_end


def test_next_token_after_a_digit_first_prompt_is_the_first_digit(tokenizer: Any) -> None:
    for needle in make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        [200],
        num_depths=2,
        num_trials=2,
        digit_first=True,
    ):
        said = needle.tokens[-needle.distance :]
        question = tokenizer.decode(needle.tokens).rpartition(" The secret")[2]
        # What followed the question where it was answered, and follows it now.
        assert tokenizer.decode(said[:1]) == needle.number[0]
        assert tokenizer.decode(said).startswith(f"{needle.number}.")
        asked = tokenizer(f" The secret{question}", add_special_tokens=False)["input_ids"]
        assert question.endswith(" is ")
        assert needle.tokens[-len(asked) :] == asked
        assert needle.tokens[-needle.distance - len(asked) : -needle.distance] == asked


def test_what_is_asked_behind_generated_text_stands_in_the_prompt(tokenizer: Any) -> None:
    needles = make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        [400],
        num_depths=3,
        num_trials=2,
        num_generated=250,
    )
    for needle in needles:
        assert needle.num_generated == 250
        prompt = tokenizer.decode(needle.tokens[:-250])
        assert prompt.count(f"is {needle.number}.") == 1
        assert tokenizer.decode(needle.tokens).count(needle.number) == 1
        assert 250 < needle.distance < len(needle.tokens)
    at_start, in_the_middle, at_end = (needle.distance for needle in needles[::2])
    assert at_start > in_the_middle > at_end
    assert at_end < 250 + 60  # the last sentence that ends in the prompt


def test_prompts_are_the_same_each_time(needles: list[Needle], tokenizer: Any) -> None:
    again = make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), [200, 400], 3, 2
    )
    assert again == needles


def _at(*distances: int) -> list[Needle]:
    return [Needle([], "1234", 500, 0.5, distance) for distance in distances]


@pytest.mark.parametrize(
    ("sinks", "every_layer_slides", "says"),
    [
        (0, True, "nothing further back than the window of 64 tokens can be recalled; recalled"),
        (4, True, "the window of 64 tokens can be recalled, but for the 4 sinks; recalled here"),
        (4, False, "some layers keep full attention and can look at the whole text; recalled here"),
    ],
)
def test_says_what_the_window_forgets(sinks: int, every_layer_slides: bool, says: str) -> None:
    hits = [True, False, True]
    text = describe_recall(64, sinks, every_layer_slides, _at(64, 65, 300), hits)
    assert says in text
    assert text.endswith("1 of 1 within the window, 1 of 2 beyond it")


def test_says_what_the_window_of_a_prompt_forgets() -> None:
    needles, hits = _at(64, 65, 300), [True, True, False]
    text = describe_recall(64, 4, True, needles, hits, Phase.PREFILL)
    assert "generated tokens see the whole text" in text
    assert "sees the window of 64 tokens and the 4 sinks; recalled here: 1 of 1 within" in text
    mixed = describe_recall(64, 0, False, needles, hits, Phase.PREFILL)
    assert mixed.startswith("some layers keep full attention")


def test_says_what_the_window_of_an_answer_sees() -> None:
    text = describe_recall(64, 4, True, _at(65, 300), [True, False], Phase.DECODE)
    assert text == (
        "generated tokens see the whole prompt, and the window of 64 tokens; recalled here: 0 of 0 "
        "within the window, 1 of 2 beyond it"
    )


def test_a_window_in_the_prompt_only_recalls_what_one_in_both_phases_forgets(
    demo_model: dict[str, Path], no_engine: Callable[[], None], tmp_path: Path
) -> None:
    no_engine()
    path, recalled = tmp_path / "needle.json", {}
    common = ["eval", "needle", str(demo_model["full"]), "--window", "64", "--lengths", "200"]
    common += ["--depths", "3", "--quick", "--dtype", "float32", "--json", str(path)]
    for phase in ("both", "prefill"):
        assert main([*common, "--phase", phase, "--full-attention-layers", "every:4"]) == 0
        result = json.loads(path.read_text())
        assert result["options"].get("phase", "both") == phase
        recalled[phase] = [n["window"] for n in result["needles"] if n["distance"] > 64]
    assert recalled == {"both": [False, False], "prefill": [True, True]}


def test_a_window_in_the_answer_only_recalls_what_stands_in_the_prompt(
    demo_model: dict[str, Path], no_engine: Callable[[], None], tmp_path: Path
) -> None:
    no_engine()
    path, recalled = tmp_path / "needle.json", {}
    common = ["eval", "needle", str(demo_model["full"]), "--window", "64", "--lengths", "200"]
    common += ["--generated", "100", "--depths", "2", "--quick", "--dtype", "float32"]
    for phase in ("both", "decode"):
        assert main([*common, "--phase", phase, "--json", str(path)]) == 0
        result = json.loads(path.read_text())
        assert result["generated"] == 100
        recalled[phase] = [(n["full attention"], n["window"]) for n in result["needles"]]
    assert recalled == {"both": [(True, False)] * 2, "decode": [(True, True)] * 2}


def test_command_asks_with_full_attention_and_with_the_window(
    no_engine: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_engine()
    path = tmp_path / "needle.json"
    command = ["eval", "needle", str(SLIDING), "--window", "64", "--sink-tokens", "0", "--quick"]
    sizes = ["--lengths", "200", "--depths", "2", "--dtype", "float32", "--json", str(path)]
    assert main([*command, *sizes]) == 0
    figures = json.loads(path.read_text())
    first, last = figures["needles"]
    assert (first["depth"], last["depth"]) == (0.0, 1.0)
    assert first["distance"] > 64 > last["distance"]
    assert not first["window"]
    printed = capsys.readouterr().out
    assert "full attention: recall; across: depth" in printed
    assert "by distance: recall; across: tokens before the answer" in printed
    assert "every layer slides: nothing further back than the window of 64" in printed
    seconds = figures["first_token_s"]
    ratio = seconds["window"]["200"] / seconds["full attention"]["200"]
    assert f" s behind 200 tokens ({ratio:.2f} of full attention's)" in printed


@pytest.mark.parametrize("name", ["ppl", "needle", "stream"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["eval", name, "--help"])
    assert status.value.code == 0
    assert f"example: swa eval {name} Qwen/Qwen3-0.6B --" in capsys.readouterr().out
