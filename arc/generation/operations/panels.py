"""Operations on panels side by side, and on how often colours occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.rules import BLACK, Grid, Operation, Operations, Random, Unfit, pick, registering

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


def _panels(grid: Grid) -> list[Grid]:
    # The panels beside lines of one colour from top to bottom, all of one size.
    [lines_at] = np.nonzero((grid == grid[0]).all(axis=0) & (grid[0] != BLACK))
    for colour in dict.fromkeys(grid[0, lines_at].tolist()):
        at = [int(place) for place in lines_at if grid[0, place] == colour]
        panels = np.split(grid, [i for place in at for i in (place, place + 1)], axis=1)[::2]
        if len(panels) > 1 and len({panel.shape for panel in panels}) == 1 and panels[0].size:
            return panels
    raise Unfit("no panels")


@operation("panels")
def combine_panels(rng: Random, colours: Sequence[int]) -> Operation:
    """Lay the panels over each other: colour cells by how many of them have one there."""
    colour = int(rng.integers(1, 10))
    kind = pick(rng, ["all", "any", "one", "none", "first", "differ"])

    def solve(grid: Grid) -> Grid:
        masks = np.stack([panel != BLACK for panel in _panels(grid)])
        count = masks.sum(axis=0)
        where = {
            "all": count == len(masks), "any": count > 0, "one": count == 1, "none": count == 0,
            "first": masks[0] & (count == 1), "differ": (count > 0) & (count < len(masks)),
        }[kind]  # fmt: skip
        return np.where(where, colour, BLACK)

    return {"kind": kind, "colour": colour}, solve


@operation("panels")
def overlay_panels(rng: Random, colours: Sequence[int]) -> Operation:
    """Lay the panels over each other, the first or the last on top."""
    last = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        panels = _panels(grid)
        changed = np.zeros_like(panels[0])
        for panel in panels if last else reversed(panels):
            changed = np.where(panel != BLACK, panel, changed)
        return changed

    return {"top": "last" if last else "first"}, solve


@operation("panels")
def choose_panel(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with the panel that has most or fewest coloured cells, or colours, or is symmetric as no other."""
    kind = pick(rng, ["cells", "fewest", "colours", "symmetric", "first", "last"])

    def solve(grid: Grid) -> Grid:
        panels = _panels(grid)
        if kind in ("first", "last"):
            return panels[0 if kind == "first" else -1]
        values = [
            len(set(panel.ravel().tolist()) - {BLACK}) if kind == "colours"
            else int((panel == panel[::-1]).all()) if kind == "symmetric"
            else int(np.count_nonzero(panel)) * (-1 if kind == "fewest" else 1)
            for panel in panels
        ]  # fmt: skip
        if values.count(max(values)) != 1:
            raise Unfit("no single choice")
        return panels[int(np.argmax(values))]

    return {"kind": kind}, solve


@operation("noise", "marks", "objects", "bars", "lines", "dirty_objects", "stacked")
def count_colours(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with the colours by how often they occur: the most or least common one, or bars of their cells."""
    kind = pick(rng, ["most", "least", "order", "bars", "fill"])

    def solve(grid: Grid) -> Grid:
        counts = np.bincount(grid.ravel(), minlength=10)
        counts[BLACK] = 0
        found = np.nonzero(counts)[0]
        if not len(found) or len(set(counts[found].tolist())) != len(found):
            raise Unfit("no order")
        order = found[np.argsort(-counts[found])]
        if kind in ("most", "least", "fill") and len(order) < 2:
            raise Unfit("one colour")
        if kind == "most":
            return np.array([[order[0]]])
        if kind == "least":
            return np.array([[order[-1]]])
        if kind == "fill":
            return np.where(grid != BLACK, order[0], BLACK)
        if kind == "order":
            return order[:, None]
        changed = np.zeros((len(order), int(counts[order[0]])), dtype=int)
        for row, colour in enumerate(order):
            changed[row, : counts[colour]] = colour
        return changed

    return {"kind": kind}, solve
