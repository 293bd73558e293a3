"""Pictures of the bench scripts' rows."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctr_train.plots import COLOURS, save_png

from .records import Machine, Row

OURS, RIVAL = COLOURS[0], "0.72"
SIZES = {"B": "rows of a batch", "F": "fields (tokens of a row)"}
MARKERS = "osD^vP*X"


def draw_sweep(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """PNG: p50 against the size that differs between the rows, both logarithmic; a panel for each measurement."""
    sizes = {name: {_size(row, name) for row in rows} for name in SIZES}
    swept = next((name for name, values in sizes.items() if len(values) > 1), "B")
    panels: dict[str, list[Row]] = {}
    for row in rows:
        fixed = re.sub(rf"\b{swept}=\d+ ?", "", row.x)
        panels.setdefault(f"{row.kernel}, {row.mode}\n{fixed}", []).append(row)
    figure, axes = _panels(len(panels), columns=2, height=4.2)
    for ax, (title, part) in zip(axes, panels.items(), strict=False):
        for index, name in enumerate(dict.fromkeys(row.provider for row in part)):
            points = [(_size(row, swept), row.p50) for row in part if row.provider == name and row.p50]
            if points:
                ax.plot(*zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], label=name,
                        color=COLOURS[index % len(COLOURS)], linewidth=2.2 if name.startswith("ours") else 1.3)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = sorted(sizes[swept])
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.set(title=title, xlabel=SIZES[swept], ylabel="ms, median")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    figure.suptitle(str(machine), fontsize=8, color="0.35")
    save_png(figure, path)


def draw_curves(curves: dict[str, Sequence[float]], title: str, path: Path) -> None:
    """PNG: losses by step, each the mean of ten."""
    figure, (ax,) = _panels(1, columns=1, height=4.2)
    for index, (name, curve) in enumerate(curves.items()):
        means = [sum(curve[at:at + 10]) / len(curve[at:at + 10]) for at in range(0, len(curve), 10)]
        ax.plot([10 * i for i in range(len(means))], means, color=COLOURS[index // 2], label=name,
                linewidth=1.2 if index % 2 else 3.0, alpha=1.0 if index % 2 else 0.45)
    ax.set(xlabel="step", ylabel="loss, mean of ten steps")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=8, color="0.35")
    save_png(figure, path)


def draw_bars(groups: dict[str, list[Row]], title: str, path: Path) -> None:
    """PNG: a panel of horizontal bars for each group of rivals, fastest first, with milliseconds and the ratio."""
    figure, axes = _panels(len(groups), columns=2, height=2.6)
    for ax, (name, rows) in zip(axes, groups.items(), strict=False):
        timed = sorted((row for row in rows if row.p50), key=lambda row: row.p50 or 0.0, reverse=True)
        ax.barh([row.provider for row in timed], [row.p50 or 0.0 for row in timed],
                color=[OURS if row.provider.startswith("ours") else RIVAL for row in timed])
        for at, row in enumerate(timed):
            ratio = f"  ({row.ratio:.1f}x)" if row.ratio and row.ratio != 1 else ""
            ax.text(row.p50 or 0.0, at, f" {row.p50:,.1f} ms{ratio}", va="center", fontsize=8)
        ax.set_xlim(0, 1.35 * max((row.p50 or 0.0 for row in timed), default=1.0))
        ax.set_title(name, fontsize=10, loc="left")
        _plain(ax)
    figure.suptitle(title, fontsize=8, color="0.35")
    save_png(figure, path)


def draw_stacks(stacks: dict[str, dict[str, dict[str, float]]], title: str, path: Path) -> None:
    """PNG: a panel for each entry, a horizontal bar for each provider, its parts side by side, in MB."""
    figure, axes = _panels(len(stacks), columns=1, height=1.9)
    for ax, (name, bars) in zip(axes, stacks.items(), strict=False):
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        left = [0.0] * len(bars)
        for index, part in enumerate(parts):
            widths = [bar.get(part, 0.0) for bar in bars.values()]
            ax.barh(list(bars), widths, left=left, label=part, color=COLOURS[index % len(COLOURS)])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for at, total in enumerate(left):
            ax.text(total, at, f" {total:,.0f} MB", va="center", fontsize=8)
        ax.set_xlim(0, 1.45 * max(left))
        ax.invert_yaxis()
        ax.set_title(name, fontsize=10, loc="left")
        ax.legend(fontsize=8, loc="center right", frameon=False)
        _plain(ax)
    figure.suptitle(title, fontsize=8, color="0.35")
    save_png(figure, path)


def _panels(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels; those left over are invisible."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(5.6 * columns if columns > 1 else 8.4, height * lines + 0.4), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_visible(False)
    return figure, flat


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(bottom=False, labelbottom=False, labelsize=8)


def _size(row: Row, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", row.x)
    return int(found[1]) if found else 0
