"""Draws design.png: the layers of the project, and the life of a batch."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#cfe3f3", "#f9dcc8", "#cdeadd", "#ececec"


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="0.4"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", side: float = 0.08) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3", "linewidth": 1.2})
    ax.text((start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2, text, fontsize=8, color="0.25", va="center")


def layers(ax: Axes) -> None:
    ax.set_title("layers: each knows those below", fontsize=11)
    rows = [("train/   ctr-data, ctr-train, ctr-eval, ctr-report", GREY),
            ("models/   FT-Transformer, AutoInt, DCNv2", GREY),
            ("ctr_kernels/   field_attention, ffn, TransformerLayer,\nEmbeddingTable, SparseSGD, ...", BLUE)]
    for i, (text, colour) in enumerate(rows):
        box(ax, 0.2, 5.2 - 1.5 * i, 6.2, 1.0, text, colour)
        arrow(ax, (3.3, 5.2 - 1.5 * i), (3.3, 4.75 - 1.5 * i))
    for x, text, colour in ((0.2, "eager\nthe formula\nin PyTorch", GREY),
                            (2.35, "native\nC++, AVX-512,\nAVX2, baseline", GREEN),
                            (4.5, "triton\nNVIDIA GPUs", ORANGE)):
        box(ax, x, 0.4, 1.9, 1.25, text, colour)


def batch(ax: Axes) -> None:
    ax.set_title("the life of a batch", fontsize=11)
    steps = [("memory-mapped rows, shuffled in a thread", GREY, "dense [B, 13], ids [B, 26]"),
             ("EmbeddingTable lookup, numeric token", GREEN, "tokens [B, 27, 64]"),
             ("LayerNorm, q | k | v, field_attention, projection", BLUE, "keeps q | k | v, no map"),
             ("LayerNorm, ffn", BLUE, "keeps its input, no hidden"),
             ("pooling, head, loss", GREY, "backward: (ids, rows)"),
             ("SparseSGD on touched rows; AdamW on the rest", GREEN, "")]
    for i, (text, colour, below) in enumerate(steps):
        y = 5.55 - 1.05 * i
        box(ax, 0.2, y, 5.2, 0.62, text, colour)
        if below:
            arrow(ax, (2.8, y), (2.8, y - 0.4), below, side=0.15)
    ax.text(5.6, 3.15, "twice", fontsize=9, color="0.25")
    ax.plot([5.55, 5.55], [2.4, 4.07], color="0.5", linewidth=1.2)


def main() -> None:
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    for ax, draw in zip(figure.subplots(1, 2), (layers, batch), strict=True):
        draw(ax)
        ax.set(xlim=(0, 6.8), ylim=(0, 6.5))
        ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
