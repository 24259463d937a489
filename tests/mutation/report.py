"""Counts of mutants and the list of those that survived, in the files beside this one."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutation.targets import PARTS

PAGE = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results.json")
SURVIVORS = Path(__file__).with_name("survivors.jsonl")
BEGIN, END = "<!-- results -->\n", "<!-- end -->\n"
KILLED_NOW = "killed now by "


class Mutant(NamedTuple):
    """A mutant of a module: which application of which operator, and what became of it."""

    module: str
    operator: str
    occurrence: int
    outcome: str
    diff: str
    printed: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What names it, as long as the module is not changed."""
        return self.module, self.operator, self.occurrence

    @property
    def killed_by(self) -> str:
        """The first test that fails."""
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", self.printed, re.MULTILINE)
        return found[1] if found else "an error at import, time or memory"

    def changed_lines(self) -> tuple[str, str]:
        """Source lines that it replaces, and what it has instead, each in one line."""
        body = self.diff.splitlines()[3:]  # behind a headline and two names
        old, new = (" ".join(x[1:].strip() for x in body if x.startswith(sign)) for sign in "-+")
        return old, new


def read_counts() -> dict[str, dict[str, int]]:
    """By module: mutants that are listed, killed, survived and pending."""
    counts: dict[str, dict[str, int]] = json.loads(RESULTS.read_text())
    return counts


def read_survivors() -> list[dict[str, Any]]:
    """Mutants that survived once, and how each is judged."""
    return [json.loads(line) for line in SURVIVORS.read_text().splitlines()]


def key_of(survivor: Mapping[str, Any]) -> tuple[str, str, int]:
    """:attr:`Mutant.key` of an entry of the list."""
    return survivor["module"], survivor["operator"], survivor["occurrence"]


def write_down(mutants: Iterable[Mutant], num_listed: Mapping[str, int]) -> None:
    """Put what became of the mutants of a part into the files.

    A survivor that a test has come to kill stays in the list and names this test.

    Args:
        num_listed: by module, how many mutants it has, with those outside the sample.
    """
    known = {key_of(survivor): survivor for survivor in read_survivors()}
    counts = read_counts()
    for module, number in num_listed.items():
        counts[module] = {"listed": number, "killed": 0, "survived": 0, "pending": 0}
    for mutant in mutants:
        counts[mutant.module][mutant.outcome.lower()] += 1
        if mutant.outcome == "SURVIVED":
            entry = known.setdefault(mutant.key, {"judged": ""})
            entry |= dict(zip(("module", "operator", "occurrence"), mutant.key, strict=True))
            entry |= dict(zip(("line", "mutant"), mutant.changed_lines(), strict=True))
        elif mutant.outcome == "KILLED" and mutant.key in known:
            known[mutant.key]["judged"] = f"{KILLED_NOW}{mutant.killed_by}"
    RESULTS.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
    lines = [json.dumps(known[key], sort_keys=True) for key in sorted(known)]
    SURVIVORS.write_text("".join(f"{line}\n" for line in lines))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


def table() -> str:
    """A row for each module, and the sums."""
    columns = ("mutants", "run", "killed", "of these since", "survived", "not judged")
    rows = [f"| module | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    counts, sums = read_counts(), Counter[str]()
    for module in (module for part in PARTS.values() for module in part if module in counts):
        count = counts[module]
        judged = [s["judged"] for s in read_survivors() if s["module"] == module]
        cells = dict(
            zip(
                columns,
                (
                    count["listed"],
                    count["killed"] + count["survived"],
                    count["killed"],
                    sum(judgement.startswith(KILLED_NOW) for judgement in judged),
                    count["survived"],
                    judged.count(""),
                ),
                strict=True,
            )
        )
        sums.update(cells)
        rows.append(f"| `{module}` | {' | '.join(map(str, cells.values()))} |")
    rows.append(f"| together | {' | '.join(str(sums[column]) for column in columns)} |")
    return "".join(f"{row}\n" for row in rows)
