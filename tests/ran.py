"""Write into tests/README.md how many tests passed on which vLLM and runner; print slow files.

``python -m tests.ran FILE``: ``FILE`` has a JSON line for each pytest that the test command ran.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from tests.helpers.runners import RUNNERS

PAGE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- what ran where -->\n", "<!-- end -->\n"
NUM_SLOW = 30


def table(ran: Path) -> str:
    """A row for each room, a column for each vLLM and model runner."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for line in ran.read_text().splitlines():
        session = json.loads(line)
        for file, outcomes in session["files"].items():
            of_runner = counts.setdefault(Path(file).parts[1], {})
            of_runner.setdefault(session["runner"], Counter()).update(outcomes)
    rows = [f"| room | {' | '.join(RUNNERS)} |", "| --- |" + " ---: |" * len(RUNNERS)]
    for room in sorted(counts):
        cells = (_cell(counts[room].get(runner, Counter())) for runner in RUNNERS)
        rows.append(f"| `{room}/` | {' | '.join(cells)} |")
    return "".join(f"{row}\n" for row in rows)


def _cell(outcomes: Counter[str]) -> str:
    others = [f"{count} {outcome}" for outcome, count in outcomes.items() if outcome != "passed"]
    return ", ".join([f"{outcomes['passed']}", *sorted(others)]) if outcomes else ""


def slow_files(ran: Path) -> str:
    """The files whose tests took longest, with their seconds on each vLLM and model runner."""
    seconds: dict[str, Counter[str]] = {}
    for line in ran.read_text().splitlines():
        session = json.loads(line)
        for file, of_file in session["seconds"].items():
            seconds.setdefault(file, Counter())[session["runner"]] += of_file
    slow = sorted(seconds, key=lambda file: -seconds[file].total())[:NUM_SLOW]
    return "".join(
        f"{seconds[file].total():7.0f} s  {file}  "
        f"({', '.join(f'{runner}: {s:.0f}' for runner, s in seconds[file].items())})\n"
        for file in slow
    )


def main() -> None:
    """Replace the table of the page, and say what took longest."""
    sys.stdout.write(f"slowest {NUM_SLOW} files, by the seconds of their tests:\n")
    sys.stdout.write(slow_files(Path(sys.argv[1])))
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n{table(Path(sys.argv[1]))}\n{END}{after}"
    if written != page:
        PAGE.write_text(written)
        sys.stdout.write(f"{PAGE}: the table of what ran where has changed; commit it\n")


if __name__ == "__main__":
    main()
