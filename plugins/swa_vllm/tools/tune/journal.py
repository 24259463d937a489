"""Scores of candidates by request, kept in a file, so that a run that was cut off goes on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_backend.window import Phase
from swa_vllm.tools.tune.candidates import Candidate

_REMEDY = "give the path of a new file, or remove this one"


@dataclass(frozen=True)
class Score:
    """What an engine says of the answer of one request.

    Attributes:
        loss: summed over the answer's tokens, in nats.
        greedy: the token that the model likes best in the place of each.
    """

    loss: float
    greedy: tuple[int, ...]


class Journal:
    """Scores by candidate and request; a request is named by its line.

    Raises:
        ValueError: the file is of other conditions, or none of these files.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self._path = path
        self._scores = dict[tuple[Candidate, int], Score]()
        if path is None:
            return
        if path.exists() and (text := path.read_text()):
            self._read(path, text, conditions)
        else:
            path.write_text(json.dumps(conditions) + "\n")

    def __contains__(self, key: tuple[Candidate, int]) -> bool:
        return key in self._scores

    def __getitem__(self, key: tuple[Candidate, int]) -> Score:
        return self._scores[key]

    def add(self, candidate: Candidate, line: int, score: Score) -> None:
        """Keep a score, in the file too."""
        self._scores[candidate, line] = score
        if self._path is not None:
            record = {**vars(candidate), "line": line, **vars(score)}
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _read(self, path: Path, text: str, conditions: Mapping[str, Any]) -> None:
        try:
            first, *lines = text.split("\n")
            found = json.loads(first)
        except ValueError as error:
            raise ValueError(
                f"--resume {path} is no file of swa tune: {error}; {_REMEDY}"
            ) from error
        if found != conditions:
            names = sorted(name for name in conditions if dict(found).get(name) != conditions[name])
            raise ValueError(
                f"--resume {path} is of another run: it differs in {', '.join(names)}; {_REMEDY}"
            )
        if lines[-1]:  # cut off while it was written
            path.write_text("\n".join([first, *lines[:-1], ""]))
        for number, line in enumerate(lines[:-1], start=2):
            try:
                self._read_score(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--resume {path}, line {number} is no score of this version of swa tune: "
                    f"{error!r}; {_REMEDY}"
                ) from error

    def _read_score(self, record: Mapping[str, Any]) -> None:
        candidate = Candidate(
            record["window"],
            record["sinks"],
            tuple(record["full_layers"]),
            Phase(record["phase"]),
            tuple(record["by_layer"]),
        )
        score = Score(record["loss"], tuple(record["greedy"]))
        self._scores[candidate, record["line"]] = score
