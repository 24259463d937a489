"""Files of JSON lines that lose nothing when a process is killed."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# Names the file that the process of a step writes what it finds to.
RECORD = "SWA_TEST_RECORD"
# Exit status of a step that could not do what it is for.
NOT_RUN = 77


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Append a record, on the disk before this returns."""
    with file.open("a") as opened:
        opened.write(json.dumps(record) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read all records that were written whole; none of a file that is not there."""
    if not file.exists():
        return []
    # The last line has no end if its process was killed while it wrote.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]


def record(**found: Any) -> None:
    """Record what a step found, where this process is one; elsewhere this does nothing."""
    if RECORD in os.environ:
        append_line(Path(os.environ[RECORD]), found)


def end_not_run(reason: str) -> NoReturn:
    """End this process as a step that could not do what it is for."""
    record(not_run=reason)
    sys.exit(NOT_RUN)
