"""The `swa` commands that the pages show: each verb is there, with the flags it is shown with."""

import re
from collections.abc import Iterator

import pytest

from swa_vllm.tools.cli import main
from tests.helpers.paths import ROOT

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
GROUPS = ("bench", "eval")


def commands(page: str) -> Iterator[str]:
    """Arguments of each command in a page: a line of a block, or code within the text."""
    for block in FENCE.findall(page):
        yield from re.findall(r"^(?:\$ )?(?:\w+=\w+ )?swa (.+)$", block.replace("\\\n", ""), re.M)
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", page)):
        if match := re.fullmatch(r"swa (.+)", " ".join(code.split())):
            yield match[1]


def shown() -> dict[str, set[str]]:
    """Flags of all commands that the pages show, by verb."""
    found: dict[str, set[str]] = {}
    for place in ("", "plugins", "swa_backend", "examples", "examples/results", "tests"):
        for command in commands((ROOT / place / "README.md").read_text()):
            words = command.split()
            verb = " ".join(words[: 2 if words[0] in GROUPS else 1])
            found.setdefault(verb, set()).update(re.findall(r"(?<!\S)--[a-z-]+", command))
    return found


SHOWN = shown()


def test_pages_show_every_verb() -> None:
    assert {"plan", "check", "trace", "tune"} <= SHOWN.keys()
    assert sum(verb.startswith("bench ") for verb in SHOWN) == 7
    assert sum(verb.startswith("eval ") for verb in SHOWN) == 3


@pytest.mark.parametrize("verb", sorted(SHOWN))
def test_verb_has_the_flags_that_a_page_shows(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert SHOWN[verb] <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
