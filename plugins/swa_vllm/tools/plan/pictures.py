"""Pictures of plans and traces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swa_vllm.tools.common.plots import new_figure
from swa_vllm.tools.common.pools import Need
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Arm

if TYPE_CHECKING:
    from swa_vllm.tools.trace.command import Trace

_ARM_COLOURS = {Arm.FULL: "#555555", Arm.STOCK: "#d98c21", Arm.SWA: "#1f77b4"}

_KIND_COLOURS = {"sink": "#2ca02c", "window": "#1f77b4", "prefill": "#ffbf00", "gone": "#dddddd"}
_KIND_LABELS = ("sink", "window", "prefill", "freed or never stored")


def plot_plan(path: Path, title: str, needs: Mapping[Workload, Mapping[Arm, Need]]) -> None:
    """Memory of one request, and requests at once where the pool is known, by prompt length."""
    lengths = [workload.num_prompt for workload in needs]
    panels = {"MiB that one request holds at most": _series(needs, "peak_bytes", 2**-20)}
    if any(need.running is not None for by_arm in needs.values() for need in by_arm.values()):
        panels["requests that run at once"] = _series(needs, "running", 1.0)
    figure = new_figure(5 * len(panels), 4)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (label, series) in zip(axes[0], panels.items(), strict=True):
        for arm, values in series.items():
            axis.plot(lengths, values, marker="o", label=arm.value, color=_ARM_COLOURS[arm])
        axis.set(xlabel="prompt, tokens", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path)


def plot_trace(path: Path, title: str, trace: "Trace") -> None:
    """A row a request: its pages by kind, stacked, up to full attention's; the pool beneath."""
    num_rows, steps = len(trace.rows), range(len(trace.used))
    figure = new_figure(10, 1.1 * num_rows + 2.6)
    axes = figure.subplots(num_rows + 1, 1, sharex=True, height_ratios=[1] * num_rows + [2])
    for index, (axis, row) in enumerate(zip(axes, trace.rows, strict=False)):
        stacks = [getattr(row, kind) for kind in _KIND_COLOURS]
        colours = list(_KIND_COLOURS.values())
        axis.stackplot(steps, *stacks, colors=colours, labels=_KIND_LABELS, step="post")
        axis.step(steps, row.full, where="post", color="black", lw=1, label="full attention")
        axis.set_ylabel(f"{index}: {row.num_prompt}", rotation=0, ha="right", va="center")
        axis.set_ylim(0, None)
    pool = axes[-1]
    pool.fill_between(steps, trace.used, step="post", color=_KIND_COLOURS["window"], label="in use")
    pool.step(steps, trace.full, where="post", color="black", lw=1, label="full attention")
    pool.axhline(trace.num_pages, color="red", lw=1, ls="--", label="pages in the pool")
    pool.set(xlabel="step", ylabel="pool, pages", ylim=(0, None), xlim=(0, len(trace.used)))
    pool.legend(loc="upper right")
    axes[0].legend(loc="upper right", ncols=5, fontsize="small")
    figure.suptitle(f"pages of each request (request: prompt tokens)\n{title}", fontsize="medium")
    figure.savefig(path)


def _series(
    needs: Mapping[Workload, Mapping[Arm, Need]], name: str, factor: float
) -> dict[Arm, Sequence[float]]:
    """Values by arm; not a number where an arm has none."""
    return {
        arm: [
            float("nan") if (value := getattr(by_arm[arm], name)) is None else factor * value
            for by_arm in needs.values()
        ]
        for arm in Arm
    }
