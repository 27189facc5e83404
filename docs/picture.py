"""Draws docs/ullme.png, the picture in the README: one model, two kinds of attention, three loss terms.

python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

BLUE, ORANGE, GREEN, GREY = "#cfe2f3", "#fce5cd", "#d9ead3", "#eeeeee"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="0.35"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="0.35", linewidth=1.2))


def mask(axes: Axes, x: float, y: float, causal: bool, color: str) -> None:
    """The attention mask: which tokens (columns) each token (rows) attends to."""
    side = 0.16
    for row in range(5):
        for column in range(5):
            seen = column <= row or not causal
            place = (x + column * side, y + (4 - row) * side)
            axes.add_patch(Rectangle(place, side, side, facecolor=color if seen else "white", edgecolor="0.6"))


def main() -> None:
    figure = Figure(figsize=(9, 3.9))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 3.9))
    axes.axis("off")
    box(axes, 0.15, 1.35, 1.35, 1.2, "query $q$ and\npassages $p$\n(positive and\nhard negatives)", GREY, 9)
    box(axes, 2.0, 1.35, 1.3, 1.2, "one decoder\nLLM\n+ LoRA", GREY, 11)
    arrow(axes, (1.5, 1.95), (2.0, 1.95))
    box(axes, 4.0, 2.35, 2.7, 1.3, "", BLUE)
    mask(axes, 4.15, 2.6, False, "#3d85c6")
    axes.text(5.1, 3.0, "bidirectional attention:\nembeddings,\ncosine of $q$ and $p$", va="center", fontsize=9)
    box(axes, 4.0, 0.25, 2.7, 1.3, "", ORANGE)
    mask(axes, 4.15, 0.5, True, "#e69138")
    axes.text(5.1, 0.9, "causal attention:\ngeneration,\nlikelihood of $p$ given $q$", va="center", fontsize=9)
    arrow(axes, (3.3, 2.15), (4.0, 2.9))
    arrow(axes, (3.3, 1.75), (4.0, 1.0))
    box(axes, 7.2, 2.6, 1.65, 0.85, "contrastive loss\n$L_{CL}$ (InfoNCE)", BLUE, 9)
    box(axes, 7.2, 1.52, 1.65, 0.85, "rankings agree\n$L_{KL}(P_{rt}\\,\\|\\,P_{gen})$", GREEN, 9)
    box(axes, 7.2, 0.45, 1.65, 0.85, "preference loss\n$L_{DPO}$ (SFT, KTO, CPO)", ORANGE, 8.5)
    arrow(axes, (6.7, 3.0), (7.2, 3.02))
    arrow(axes, (6.7, 2.7), (7.2, 2.05))
    arrow(axes, (6.7, 1.2), (7.2, 1.85))
    arrow(axes, (6.7, 0.9), (7.2, 0.88))
    figure.savefig(Path(__file__).with_name("ullme.png"), dpi=110)


if __name__ == "__main__":
    main()
