"""Pictures, drawn with matplotlib, which the ``plot`` extra installs; imported when needed."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_vllm.tools.common.arguments import check_output_path


@dataclass(frozen=True)
class HeatMap:
    """A map of values from 0 to 1 by row and column, None where there is no value."""

    title: str
    values: Sequence[Sequence[float | None]]
    columns: Sequence[str]
    rows: Sequence[str]
    x_label: str
    y_label: str


def add_plot_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option of every tool that draws."""
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a PNG; needs matplotlib")


def check_plot_path(path: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        ValueError: the name is no PNG's, or the file cannot be written.
        RuntimeError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix != ".png":
        raise ValueError(f"--plot {path}: the picture is a PNG, so give a name that ends in .png")
    check_output_path("--plot", path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "--plot needs matplotlib, which is not installed: pip install 'swa-backend[plot]', or "
            "leave --plot out"
        ) from error


def draw_lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: bool = True,
    from_zero: bool = False,
) -> None:
    """Draw a line for each series of (x, y)."""
    figure = new_figure(6, 4)
    axes = figure.subplots(1, 1, squeeze=False)[0]
    for name, points in series.items():
        ordered = sorted(points)
        marker = "o" if marks else None
        axes[0].plot(*zip(*ordered, strict=True), marker=marker, markersize=3, label=name)
    axes[0].set(xlabel=x_label, ylabel=y_label)
    axes[0].set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    if from_zero:
        axes[0].set_ylim(0, None)
    axes[0].legend()
    figure.savefig(path)


def draw_bars(
    path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float]], y_label: str
) -> None:
    """Draw groups of bars, a bar for each series."""
    figure = new_figure(max(6, 1.3 * len(groups) + 2), 4)
    axis = figure.subplots(1, 1)
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        axis.bar([place + offset for place in range(len(groups))], values, width, label=name)
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right", fontsize="small")
    axis.set_ylabel(y_label)
    axis.legend()
    figure.savefig(path)


def draw_heat_maps(path: Path, maps: Sequence[HeatMap]) -> None:
    """Draw the maps side by side."""
    figure = new_figure(6 * len(maps), 4)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
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


def new_figure(width: float, height: float) -> Any:
    """Make an empty picture of so many inches."""
    from matplotlib.figure import Figure  # of no window system

    return Figure(figsize=(width, height), layout="constrained", dpi=120)
