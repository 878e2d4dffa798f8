"""Grids as pictures in the colours of ARC: HTML for notebooks, matplotlib figures."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours 0 to 9 as the ARC Prize's pages show them.
PALETTE = (
    "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25",
)  # fmt: skip
LINES = "#555555"  # between cells
CELL = 14  # pixels, of a small grid
WIDEST = 168  # pixels, of a large one


def grid_html(grid: np.ndarray) -> str:
    """A grid (height, width) of 0..9 as an SVG element; cells of large grids are smaller."""
    height, width = grid.shape
    size = min(CELL, WIDEST // max(height, width))
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1" height="1" fill="{PALETTE[grid[y, x]]}"/>'
        for y in range(height)
        for x in range(width)
    )
    rows = "/".join("".join(map(str, row)) for row in grid.tolist())
    return (
        f'<svg role="img" aria-label="{height} by {width} grid {rows}" width="{width * size}" height="{height * size}" '
        f'viewBox="0 0 {width} {height}" shape-rendering="crispEdges">'
        f'<g stroke="{LINES}" stroke-width="{1 / size:.3f}">{cells}</g></svg>'
    )


def view_html(view: dict[str, Any]) -> str:
    """A view of `ArcDataset.__getitem__` as a row of pairs, inputs above outputs, the test last ("?" if unsolved)."""
    boxes = [_pair_html(a, b, f"{number}") for number, (a, b) in enumerate(view["train"], 1)]
    if view["test"] is not None:
        boxes.append(_pair_html(view["test"], view["solution"], "test"))
    return (
        f'<div style="margin:8px 0"><code>{html.escape(view["key"])}</code>'
        f'<div style="display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start">{"".join(boxes)}</div></div>'
    )


def _pair_html(query: np.ndarray, reply: np.ndarray | None, title: str) -> str:
    answer = "<b>?</b>" if reply is None else grid_html(reply)
    style = "display:flex;flex-direction:column;gap:4px;align-items:flex-start"
    return f'<div style="{style}"><small>{title}</small>{grid_html(query)}<span>&darr;</span>{answer}</div>'


def dataset_html(text: str, views: Sequence[dict[str, Any]], more: int) -> str:
    """A dataset: its description, the views that are shown, and how many more there are."""
    rest = f"<div>and {more:,} more</div>" if more else ""
    return f"<div><pre>{html.escape(text)}</pre>{''.join(map(view_html, views))}{rest}</div>"


def plot_grid(axis: Axes, grid: np.ndarray | None, title: str = "") -> None:
    """Draw a grid, or a question mark where there is none, into matplotlib axes."""
    from matplotlib.colors import ListedColormap

    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    if grid is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "?", ha="center", va="center", fontsize=20, transform=axis.transAxes)
        return
    height, width = grid.shape
    axis.imshow(grid, cmap=ListedColormap(PALETTE), vmin=0, vmax=9, interpolation="nearest")
    thin = 0.6 if max(height, width) <= 15 else 0.25
    axis.hlines(np.arange(height + 1) - 0.5, -0.5, width - 0.5, color=LINES, linewidth=thin)
    axis.vlines(np.arange(width + 1) - 0.5, -0.5, height - 0.5, color=LINES, linewidth=thin)
    axis.set_frame_on(False)


def share_cell_size(axes: np.ndarray) -> None:
    """Give the cells of all grids in axes of one size the same size; else a grid twice as large would look alike.

    `axes` are those of `Figure.subplots`, after `plot_grid`.
    """
    drawn = [axis for axis in axes.flat if axis.images]
    shapes = [axis.images[0].get_array().shape for axis in drawn]
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    for axis, (rows, columns) in zip(drawn, shapes, strict=True):
        right, down = (width - columns) / 2, (height - rows) / 2
        axis.set_xlim(-0.5 - right, columns - 0.5 + right)
        axis.set_ylim(rows - 0.5 + down, -0.5 - down)


def new_figure(width: float, height: float) -> Figure:
    """A figure (inches) that notebooks show by itself, and that no list of open figures holds."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            with io.BytesIO() as file:
                self.savefig(file, format="png", dpi=90)
                return file.getvalue()

    return NotebookFigure(figsize=(width, height), layout="constrained")


def plot_view(view: dict[str, Any]) -> Figure:
    """A figure (see `new_figure`) of a view of `ArcDataset.__getitem__`.

    Inputs are in the upper row, outputs below, the test pair on the right.
    """
    columns = [(a, b, f"{number}") for number, (a, b) in enumerate(view["train"], 1)]
    if view["test"] is not None:
        columns.append((view["test"], view["solution"], "test"))
    figure = new_figure(1.6 * len(columns) + 0.2, 3.6)
    axes = figure.subplots(2, len(columns), squeeze=False)
    for column, (query, reply, title) in enumerate(columns):
        plot_grid(axes[0, column], query, title)
        plot_grid(axes[1, column], reply)
    share_cell_size(axes)
    figure.suptitle(view["key"], fontsize=8, x=0.01, ha="left", family="monospace")
    return figure
