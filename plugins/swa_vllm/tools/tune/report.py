"""What a search for a window found, as text, as JSON, and as a picture."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_backend.table import format_table
from swa_vllm.tools.common import plots
from swa_vllm.tools.tune.candidates import FULL, Candidate
from swa_vllm.tools.tune.paired import Rise
from swa_vllm.tools.tune.sizes import Gain

_HEADER = (
    "",
    "perplexity, 95 % interval",
    "same tokens",
    "recalled",
    "KV groups",
    "MiB a request",
    "to full",
    "at once",
    "first token",
)


@dataclass(frozen=True)
class Arm:
    """What the requests held out say of a candidate, and what it gains.

    Attributes:
        running: requests at once; None where the engine does not start.
        rise: of the loss; None for full attention itself.
        agreement: part of the answers' tokens that full attention likes best too.
        recalled: numbers that made-up texts mention once, and how many of them were recalled.
    """

    candidate: Candidate
    gain: Gain
    running: float | None
    rise: Rise | None
    agreement: float
    recalled: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "additional_config": {"swa": self.candidate.options()},
            "rise": None if self.rise is None else self.rise.to_json(),
            "same_tokens": self.agreement,
            "recalled": list(self.recalled),
            "running": self.running,
            **vars(self.gain),
        }


def describe_arms(arms: Mapping[str, Arm]) -> str:
    """Make a table of full attention, the choice and the runner-up."""
    full = arms["full attention"]
    rows = [
        [
            name,
            "-" if arm.rise is None else arm.rise.text(),
            f"{100 * arm.agreement:.1f} %",
            "{} of {}".format(*arm.recalled) if arm.recalled[1] else "-",
            arm.gain.num_groups,
            arm.gain.num_bytes / 2**20,
            arm.gain.num_bytes / full.gain.num_bytes,
            None if arm.running is None else f"{arm.running:.1f}",
            arm.gain.first_token,
        ]
        for name, arm in arms.items()
    ]
    shown = [f"{name}: {json.dumps(arm.candidate.options())}" for name, arm in arms.items()]
    return "\n".join([format_table(_HEADER, rows), *shown[1:]])


def describe_choice(candidate: Candidate) -> str:
    """Write the option to serve with."""
    return f"--additional-config '{json.dumps({'swa': candidate.options()})}'"


def draw_front(
    path: Path,
    rises: Mapping[Candidate, Rise],
    gains: Mapping[Candidate, Gain],
    chosen: Arm | None,
) -> None:
    """Draw the rise of perplexity against bytes: the front of what was measured, and the rest."""
    full = gains[FULL].num_bytes
    points = {c: (gains[c].num_bytes / full, 100 * rises[c].mean) for c in rises}
    front = [
        (part, rise)
        for part, rise in points.values()
        if not any(p <= part and r <= rise and (p, r) != (part, rise) for p, r in points.values())
    ]
    series = {"front, requests that chose": [*front, (1.0, 0.0)]}
    series |= {c.text(): [point] for c, point in points.items() if point not in front}
    if chosen is not None and chosen.rise is not None:
        held_out = (gains[chosen.candidate].num_bytes / full, 100 * chosen.rise.mean)
        series["the choice, held-out requests"] = [held_out]
    plots.draw_lines(
        path,
        series,
        "KV cache of a request, part of full attention's",
        "rise of the loss, 0.01 nats a token",
    )
