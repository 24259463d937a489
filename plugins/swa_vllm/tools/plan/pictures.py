"""The picture of a plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.plots import new_figure
from swa_vllm.tools.common.pools import Need
from swa_vllm.tools.common.queueing import Workload

_ARM_COLOURS = {Arm.FULL: "#555555", Arm.STOCK: "#d98c21", Arm.SWA: "#1f77b4"}


def plot_plan(path: Path, title: str, needs: Mapping[Workload, Mapping[Arm, Need]]) -> None:
    """Draw the memory of one request by prompt length, and requests at once in a known pool."""
    lengths = [workload.num_prompt for workload in needs]
    panels = {
        "MiB that one request holds at most": _plan_picture_series(needs, "peak_bytes", 2**-20)
    }
    if any(need.running is not None for by_arm in needs.values() for need in by_arm.values()):
        panels["requests that run at once"] = _plan_picture_series(needs, "running", 1.0)
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


def _plan_picture_series(
    needs: Mapping[Workload, Mapping[Arm, Need]], name: str, factor: float
) -> dict[Arm, Sequence[float]]:
    """List the values of a figure by arm, NaN where an arm has none."""
    return {
        arm: [
            float("nan") if (value := getattr(by_arm[arm], name)) is None else factor * value
            for by_arm in needs.values()
        ]
        for arm in Arm
    }
