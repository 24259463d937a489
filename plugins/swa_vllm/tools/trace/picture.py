"""The picture of a trace."""

from pathlib import Path

from swa_vllm.tools.common.plots import new_figure
from swa_vllm.tools.trace.recording import Trace

# From the bottom of a stack to its top.
_KIND_COLOURS = {
    "sink": "#2ca02c",
    "prompt": "#2ca02c",
    "window": "#1f77b4",
    "prefill": "#ffbf00",
    "gone": "#dddddd",
}


def plot_trace(path: Path, title: str, trace: Trace) -> None:
    """Draw each request's pages by kind, stacked up to full attention's, and the pool beneath."""
    colours = {k: c for k, c in _KIND_COLOURS.items() if k in (*trace.kinds, "gone")}
    labels = ["freed or never stored" if kind == "gone" else kind for kind in colours]
    num_rows, steps = len(trace.rows), range(len(trace.used))
    figure = new_figure(10, 1.1 * num_rows + 2.6)
    axes = figure.subplots(num_rows + 1, 1, sharex=True, height_ratios=[1] * num_rows + [2])
    for index, (axis, row) in enumerate(zip(axes, trace.rows, strict=False)):
        stacks = [getattr(row, kind) for kind in colours]
        axis.stackplot(steps, *stacks, colors=[*colours.values()], labels=labels, step="post")
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
