"""Metrics files in, figures out: PNG files in a stage's plots/ folder, SVG for the report."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tdro_hpc.atomic import replaced_file
from tdro_hpc.training.metrics import read_rows

Row = dict[str, Any]
_STYLES = ("-", "--", ":")  # with 10 colours: 30 tasks can be told apart


def smoothed(values: Sequence[float], *, window: int) -> list[float]:
    """Mean of each value and those before it, `window` of them at most."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def loss_figure(rows: list[Row]) -> Figure:
    """Mean loss over steps, raw and smoothed."""
    figure, axes = _figure(7, 3.2)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = max(2, len(rows) // 10)
    axes.plot(steps, losses, color="0.75", label="each interval", marker="." if len(rows) < 40 else "")
    axes.plot(steps, smoothed(losses, window=window), color="C0", label=f"mean of {window} intervals")
    _label(axes, "optimiser step", "loss, nats")
    axes.legend(frameon=False)
    return figure


def throughput_figure(rows: list[Row]) -> Figure:
    """Queries a second over steps."""
    figure, axes = _figure(7, 2.6)
    axes.plot([row["step"] for row in rows], [row["clock"]["queries_per_second"] for row in rows], color="C2")
    axes.set_ylim(bottom=0)
    _label(axes, "optimiser step", "queries a second")
    return figure


def alpha_figure(trajectory: list[Row]) -> Figure:
    """Weight of every task over steps; names stand in the order of the last weights, the greatest first."""
    last = trajectory[-1]["alpha"]
    names = sorted(last, key=lambda name: -last[name])
    figure, axes = _figure(9, max(3.6, 0.22 * len(names) + 0.8))
    steps = [0] + [row["step"] for row in trajectory]
    uniform = 1 / len(names)
    for position, name in enumerate(names):
        values = [uniform] + [row["alpha"][name] for row in trajectory]
        style = _STYLES[position // 10 % len(_STYLES)]
        axes.plot(steps, values, style, color=f"C{position % 10}", linewidth=1.6, label=f"{last[name]:.3f}  {name}")
    axes.axhline(uniform, color="0.6", linewidth=0.8)
    axes.set_ylim(bottom=0)
    _label(axes, "optimiser step", "task weight alpha")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, handlelength=3)
    return figure


def share_figure(alpha: dict[str, float], sizes: dict[str, int]) -> Figure:
    """Last weight of every task beside its share of the rows."""
    names = sorted(alpha, key=lambda name: alpha[name])
    total = sum(sizes[name] for name in names)
    figure, axes = _figure(8, max(2.6, 0.3 * len(names) + 0.8))
    places = range(len(names))
    axes.barh([p + 0.2 for p in places], [alpha[name] for name in names], height=0.4, label="task weight alpha")
    shares = [sizes[name] / total for name in names]
    axes.barh([p - 0.2 for p in places], shares, height=0.4, color="0.75", label="share of the rows")
    axes.axvline(1 / len(names), color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(list(places), names, fontsize=8)
    _label(axes, "share (dotted: uniform)", "")
    axes.legend(frameon=False, loc="lower right")
    return figure


def task_loss_figure(rows: list[Row]) -> Figure:
    """Loss of the proxy and of the reference for every task, over steps, a small panel each."""
    names = sorted({name for row in rows for name in row["task_loss"]})
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for name, panel in zip(names, panels.flat, strict=False):
        for key, label, color in (("task_loss", "proxy", "C0"), ("task_reference_loss", "reference", "C1")):
            points = [(row["step"], row[key][name]) for row in rows if name in row.get(key, {})]
            if points:
                panel.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.2)
        panel.set_title(name, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_ylim(bottom=0)
    panels.flat[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("optimiser step", fontsize=8)
    figure.supylabel("loss, nats", fontsize=8)
    return figure


def stage_figures(stage_dir: Path) -> dict[str, Figure]:
    """Every figure that the files of this stage allow, by name."""
    rows = [row for row in read_rows(stage_dir / "metrics.jsonl") if "loss" in row]
    trajectory = read_rows(stage_dir / "trajectory.jsonl")
    figures: dict[str, Figure] = {}
    if rows:
        figures |= {"loss": loss_figure(rows), "throughput": throughput_figure(rows)}
    if rows and trajectory:
        figures |= {"alpha": alpha_figure(trajectory), "task_loss": task_loss_figure(rows)}
        sizes = _sizes(stage_dir)
        if sizes:
            figures["alpha_and_share"] = share_figure(trajectory[-1]["alpha"], sizes)
    return figures


def write_plots(stage_dir: Path) -> list[Path]:
    """Write each figure of the stage to plots/<name>.png; returns the files."""
    paths = []
    for name, figure in stage_figures(stage_dir).items():
        path = stage_dir / "plots" / f"{name}.png"
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        paths.append(path)
    return paths


def svg_uri(figure: Figure) -> str:
    """The figure as a data: address, so that a page that holds it loads nothing."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tdro"}):  # the same page twice has the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sizes(stage_dir: Path) -> dict[str, int]:
    """Rows of every task, from the weights file of a finished s1; {} before that."""
    path = stage_dir / "out" / "weights" / "curr_weights.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["size"]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _label(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
