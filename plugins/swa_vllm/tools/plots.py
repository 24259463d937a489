"""Pictures of the evaluations, by matplotlib of the ``plot`` extra, imported when asked for."""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HeatMap:
    """Values from 0 to 1, or None where there is none, by row and column."""

    title: str
    values: Sequence[Sequence[float | None]]
    columns: Sequence[str]
    rows: Sequence[str]
    x_label: str
    y_label: str


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every tool that draws."""
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a PNG; needs matplotlib")


def check(path: Path | None) -> None:
    """Refuse what could not be drawn, before anything is measured.

    Raises:
        ValueError: the name is no PNG's, or its directory does not exist.
        RuntimeError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix != ".png":
        raise ValueError(f"--plot draws PNG pictures, got {path}; name a file that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no directory {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "--plot needs matplotlib, which is not installed: pip install 'swa-backend[plot]', or "
            "leave --plot out"
        )


def lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
) -> None:
    """A line with marks for each series of (x, y)."""
    figure, axes = _figure(1)
    for name, points in series.items():
        ordered = sorted(points)
        axes[0].plot(*zip(*ordered, strict=True), marker="o", markersize=3, label=name)
    axes[0].set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
    axes[0].legend()
    figure.savefig(path)


def heat_maps(path: Path, maps: Sequence[HeatMap]) -> None:
    """The maps side by side."""
    figure, axes = _figure(len(maps))
    for axis, heat_map in zip(axes, maps, strict=True):
        filled = [[float("nan") if v is None else v for v in row] for row in heat_map.values]
        image = axis.imshow(filled, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set(title=heat_map.title, xlabel=heat_map.x_label, ylabel=heat_map.y_label)
        axis.set_xticks(range(len(heat_map.columns)), heat_map.columns)
        axis.set_yticks(range(len(heat_map.rows)), heat_map.rows)
        for y, row in enumerate(heat_map.values):
            for x, value in enumerate(row):
                if value is not None:
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center")
    figure.colorbar(image, ax=axes, label="recall")
    figure.savefig(path)


def _figure(num_axes: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # of no window system

    figure = Figure(figsize=(6 * num_axes, 4), layout="constrained", dpi=120)
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]
