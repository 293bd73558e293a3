"""Pictures of runs side by side: learning curves and the reliability diagram."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import atomic_path

SMOOTHING = 10  # log lines that the mean of a training curve reaches back, a 200th of a run each
MIN_ROWS = 10  # of a bin in the reliability diagram
# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")


@dataclass
class RunCurves:
    """What the pictures show of one run.

    Attributes:
        name: as the legends have it.
        training: (rows seen, training loss) a log line.
        validation: (rows seen, validation logloss) an evaluation.
        gold: (rows seen, gold logloss) of a finished run.
        best_possible: logloss of the true probabilities on the gold rows, where they are known.
        reliability: bins of `metrics.reliability` on the gold rows; [] of an unfinished run.
    """

    name: str
    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    gold: tuple[int, float] | None = None
    best_possible: float | None = None
    reliability: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name as matplotlib shows it: it leaves out what begins with "_", and sets formulas between "$"."""
        plain = " ".join(self.name.encode(errors="backslashreplace").decode().split()).replace("$", r"\$")
        return f"\u200b{plain}" if plain.startswith("_") else plain


def smooth(values: Sequence[float], reach: int = SMOOTHING) -> np.ndarray:
    """Mean of each value and up to `reach` - 1 values before it: float64 [len(values)]."""
    total = np.cumsum([0.0, *values])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - reach, 0)
    return (total[last] - total[first]) / (last - first)


def wilson_interval(rate: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95% score interval of an observed rate among `count` rows; also sound at 0 and 1."""
    z2 = 1.96**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * np.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return np.minimum(centre - half, rate), np.maximum(centre + half, rate)  # rounding must not leave the rate outside


def draw_curves(runs: Sequence[RunCurves], path: Path) -> None:
    """PNG: training loss (smoothed) and validation logloss against rows seen; the gold logloss at the end.

    Raises UserError where the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for index, run in enumerate(runs):
        style = _style(index)
        if run.training:
            rows, losses = zip(*run.training, strict=True)
            left.plot(rows, smooth(losses), label=run.label, **style)
        if run.validation:
            right.plot(*zip(*run.validation, strict=True), marker="o", markersize=4, label=run.label, **style)
        if run.gold is not None:
            right.plot(*run.gold, marker="*", markersize=13, linestyle="none", color=style["color"],
                       label=None if run.validation else run.label)
    for floor in sorted({run.best_possible for run in runs if run.best_possible is not None}):
        for axes in (left, right):
            axes.axhline(floor, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
        right.annotate(f"best possible {floor:.4f}", (1, floor), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                       textcoords="offset points", ha="right", fontsize=8, color="0.35")
    left.set(title=f"training loss (mean of {SMOOTHING} log lines)", ylabel="logloss (nats)")
    right.set(title="validation logloss; star: gold rows")
    for axes, what in ((left, "no training steps yet"), (right, "no evaluations yet")):
        axes.set_xlabel("rows seen")
        axes.xaxis.set_major_formatter(_rows)
        axes.grid(alpha=0.3)
        _legend(axes, what)
    save_png(figure, path)


def draw_reliability(runs: Sequence[RunCurves], path: Path) -> None:
    """PNG: observed click rate against mean prediction in each bin of prediction, and how many rows the bins hold.

    The bars are 95% intervals (Wilson 1927) of the observed rate. Bins of fewer than `MIN_ROWS` rows, which say
    nothing of a rate, are counted below but not drawn above. Raises UserError where the file cannot be written.
    """
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=(0, (1, 2)))
    drawn = [(index, run) for index, run in enumerate(runs) if run.reliability]
    for index, run in drawn:
        style = _style(index)
        predicted, observed, count, lower, upper = (
            np.array([entry[key] for entry in run.reliability])
            for key in ("mean_prediction", "observed_rate", "count", "lower", "upper"))
        bins = round(1 / (upper[0] - lower[0]))
        counts = np.zeros(bins, dtype=np.int64)  # with the empty bins, which a report leaves out
        counts[(lower * bins).round().astype(np.int64)] = count
        bottom.stairs(counts, np.arange(bins + 1) / bins, color=style["color"], linestyle=style["linestyle"],
                      linewidth=1.5)
        enough = count >= MIN_ROWS
        low, high = wilson_interval(observed[enough], count[enough])
        top.errorbar(predicted[enough], observed[enough], yerr=[observed[enough] - low, high - observed[enough]],
                     marker="o", markersize=4, capsize=2, elinewidth=0.8, label=run.label, **style)
    top.set(title=f"reliability on the gold rows (bins of {MIN_ROWS} rows or more)", ylabel="observed click rate",
            xlim=(0, 1), ylim=(-0.01, 1.01))
    bottom.set(xlabel="predicted click probability", ylabel="rows in the bin")
    if drawn:
        bottom.set_yscale("log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    _legend(top, "no finished run yet")
    save_png(figure, path)


def _style(index: int) -> dict[str, Any]:
    """Colour, and line style once the colours are used up."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}


def _legend(axes: Axes, if_empty: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, if_empty, transform=axes.transAxes, ha="center", color="0.4")


def _rows(value: float, position: int | None = None) -> str:
    """1500000 -> "1.5M"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a PNG, atomically; UserError where it cannot be written."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
