"""What may be served: a window or two, sinks, full layers, and the phase that has the window."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

from swa_backend.window import Phase

View = tuple[int, int, Phase]  # what a sliding layer sees: window, sinks, and whose queries


@dataclass(frozen=True)
class Candidate:
    """A window for some layers, or two.

    Attributes:
        window: None for full attention in all layers; of two windows the wider.
        full_layers: layers without a window, in order.
        phase: whose tokens have the window.
        by_layer: of two windows, that of each layer, 0 for full attention; empty for one window.
    """

    window: int | None = None
    sinks: int = 0
    full_layers: tuple[int, ...] = ()
    phase: Phase = Phase.BOTH
    by_layer: tuple[int, ...] = ()

    @property
    def view(self) -> View:
        """What its sliding layers see, those of the wider window."""
        return self.window or 0, self.sinks, self.phase

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """List the window of each layer, None for full attention."""
        if self.by_layer:
            return tuple(window or None for window in self.by_layer)
        full = set(self.full_layers)
        return tuple(None if layer in full else self.window for layer in range(num_layers))

    def options(self) -> dict[str, Any]:
        """Spell it as ``swa`` options."""
        if self.window is None:
            return {"enabled": False}
        sinks = {"sink_tokens": self.sinks} if self.sinks else {}
        phase = {} if self.phase is Phase.BOTH else {"phase": self.phase.value}
        if self.by_layer:
            return {"window": _spell_windows(self.by_layer), **sinks, **phase}
        full = list(self.full_layers) or "none"
        return {"window": self.window, **sinks, "full_attention_layers": full, **phase}

    def text(self) -> str:
        """Name it for a reader."""
        if self.window is None:
            return "full attention"
        windows = " and ".join(map(str, sorted({*self.by_layer, self.window} - {0})))
        phase = "" if self.phase is Phase.BOTH else f", {self.phase} only"
        return f"window {windows}, sinks {self.sinks}, full layers {len(self.full_layers)}{phase}"


FULL = Candidate()


def _spell_windows(by_layer: Sequence[int]) -> dict[str, int]:
    """Name the layers of each window, those that follow one another as a range."""
    runs = dict[int, list[str]]()
    for window, run in groupby(range(len(by_layer)), lambda layer: by_layer[layer]):
        layers = list(run)
        ends = dict.fromkeys((str(layers[0]), str(layers[-1])))
        if window:
            runs.setdefault(window, []).append("-".join(ends))
    return {",".join(runs[window]): window for window in sorted(runs)}


@dataclass(frozen=True)
class Layout:
    """A candidate but for which layers are full."""

    window: int
    sinks: int
    num_full: int
    phase: Phase = Phase.BOTH

    @property
    def view(self) -> View:
        """What its sliding layers see."""
        return self.window, self.sinks, self.phase

    def with_full_layers(self, order: Sequence[int]) -> Candidate:
        """Make a candidate whose full layers are the first of ``order``."""
        full = tuple(sorted(order[: self.num_full]))
        return Candidate(self.window, self.sinks, full, self.phase)


class Objective(StrEnum):
    """What is to be gained; ``LOSS``: nothing beyond the budget, at the least loss."""

    LOSS = "loss"
    THROUGHPUT = "throughput"
    TTFT = "ttft"
    MEMORY = "memory"
