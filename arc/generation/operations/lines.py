"""Operations on a grid that one line divides: above and below, extend and move to a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import draw_connectivity, find_objects, slide
from arc.generation.rules import BLACK, Grid, Operation, Operations, Random, Unfit, pick, registering

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


def _line(grid: Grid) -> tuple[bool, int]:
    # The one row or column that is all of one colour: whether it is a column, and which.
    found = []
    for upright, turned in enumerate((grid, grid.T)):
        whole = (turned == turned[:, :1]).all(axis=1) & (turned[:, 0] != BLACK)
        found += [(bool(upright), int(at)) for at in np.nonzero(whole)[0]]
    if len(found) != 1 or min(grid.shape) < 2:
        raise Unfit("no single line")
    return found[0]


@operation("divided", "lines")
def side_of_line(rng: Random, colours: Sequence[int]) -> Operation:
    """Empty one side of the line, or colour its objects, or what is black there."""
    kind, first = pick(rng, ["empty", "objects", "black"]), bool(rng.integers(2))
    colour = BLACK if kind == "empty" else int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        upright, at = _line(grid)
        turned = changed.T if upright else changed
        side = turned[:at] if first else turned[at + 1 :]
        side[(side == BLACK) == (kind == "black")] = colour
        return changed

    return {"kind": kind, "first": first, "colour": colour}, solve


@operation("divided")
def copy_over_line(rng: Random, colours: Sequence[int]) -> Operation:
    """Copy what is on one side of the line to the other, mirrored in the line or as it stands."""
    first, mirrored = bool(rng.integers(2)), bool(rng.random() < 0.6)

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        upright, at = _line(grid)
        turned = changed.T if upright else changed
        source, target = turned[:at], turned[at + 1 :]
        if not first:
            source, target = target, source
        if mirrored:  # the rows that are next to the line first
            source, target = (source[::-1], target) if first else (source, target[::-1])
        elif len(source) != len(target):
            raise Unfit("sides of two sizes")
        for old, new in zip(source, target, strict=False):
            new[new == BLACK] = old[new == BLACK]
        return changed

    return {"first": first, "mirrored": mirrored}, solve


@operation("divided", "lines")
def move_to_line(rng: Random, colours: Sequence[int]) -> Operation:
    """Move objects until the line, or from it until the edge."""
    way, towards = draw_connectivity(rng), bool(rng.random() < 0.6)

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        upright, at = _line(grid)
        turned, rest = (changed.T, grid.T.copy()) if upright else (changed, grid.copy())
        rest[at] = BLACK
        items = find_objects(rest, *way)
        items.sort(key=lambda item: int(abs(item.rows - at).min()) * (1 if towards else -1))
        for item in items:
            slide(turned, item, (1 if (item.rows[0] < at) == towards else -1, 0), max(grid.shape))
        return changed

    return {"way": way, "towards": towards}, solve


@operation("divided", "lines")
def reach_line(rng: Random, colours: Sequence[int]) -> Operation:
    """Draw lines from everything to the line, in the colours of what they begin at, the line's or another one."""
    kind, drawn = pick(rng, ["own", "line", "other"]), int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        upright, at = _line(grid)
        turned, source = (changed.T, grid.T) if upright else (changed, grid)
        for row, column in zip(*np.nonzero(source), strict=True):
            step, row = (1, int(row)) if row < at else (-1, int(row))
            colour = {"own": source[row, column], "line": source[at, 0], "other": drawn}[kind]
            for r in range(row + step, at, step) if row != at else ():
                if source[r, column]:
                    break
                turned[r, column] = colour
        return changed

    return {"kind": kind, "colour": drawn if kind == "other" else None}, solve
