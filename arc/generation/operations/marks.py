"""Operations on single cells: extend to a boundary, horizontal and vertical, count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import colours_of, index_of_best, is_inside
from arc.generation.rules import BLACK, CORNERS, Grid, Operation, Operations, Random, Unfit, pick, registering

LEGIBLE = 10  # cells from which bent lines begin: more of them could not be told apart
OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation("marks")
def bounce(rng: Random, colours: Sequence[int]) -> Operation:
    """From each cell of a colour, or any, go on diagonally up or down and turn back at the left and right edges."""
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None
    down, first, drawn = (
        pick(rng, [1, -1]),
        pick(rng, [1, -1]),
        int(rng.integers(1, 10)) if rng.random() < 0.4 else None,
    )

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        if grid.shape[1] < 3 or np.count_nonzero(grid) > LEGIBLE:
            raise Unfit("too narrow, or too many lines")
        for row, column in zip(*np.nonzero(grid if only is None else grid == only), strict=True):
            r, c, right = int(row) + down, int(column), first
            while 0 <= r < len(grid):
                right = right if 0 <= c + right < grid.shape[1] else -right
                c += right
                if not grid[r, c]:
                    changed[r, c] = grid[row, column] if drawn is None else drawn
                r += down
        return changed

    return {"only": only, "down": down, "first": first, "colour": drawn}, solve


@operation("marks")
def stairs(rng: Random, colours: Sequence[int]) -> Operation:
    """From each cell of a colour, or any, draw stairs of one kind until the edge."""
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None
    (down, right), level, rise = pick(rng, CORNERS), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    drawn = int(rng.integers(1, 10)) if rng.random() < 0.4 else None
    steps = [(0, right)] * level + [(down, 0)] * rise

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        if np.count_nonzero(grid) > LEGIBLE:
            raise Unfit("too many lines")
        for row, column in zip(*np.nonzero(grid if only is None else grid == only), strict=True):
            r, c = int(row), int(column)
            for number in range(grid.size):
                r, c = r + steps[number % len(steps)][0], c + steps[number % len(steps)][1]
                if not is_inside(grid, r, c):
                    break
                if not grid[r, c]:
                    changed[r, c] = grid[row, column] if drawn is None else drawn
        return changed

    return {"only": only, "steps": steps, "colour": drawn}, solve


@operation("marks", "model")
def crossings(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour the black cells where the row of one cell and the column of another cross."""
    colour, only = int(rng.integers(1, 10)), int(pick(rng, colours)) if rng.random() < 0.3 else None

    def solve(grid: Grid) -> Grid:
        cells = grid != BLACK if only is None else grid == only
        return np.where((grid == BLACK) & cells.any(axis=1)[:, None] & cells.any(axis=0), colour, grid)

    return {"colour": colour, "only": only}, solve


@operation("marks")
def connect_bent(rng: Random, colours: Sequence[int]) -> Operation:
    """Join the two cells of a colour by a line with one corner."""
    across, drawn = bool(rng.integers(2)), int(rng.integers(1, 10)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for colour in sorted(colours_of(grid)):
            ends = np.argwhere(grid == colour).tolist()
            if len(ends) != 2:
                continue
            (top, first), (bottom, second) = ends
            bend, (left, right) = (second, top) if across else (first, bottom), sorted((first, second))
            for line in (changed[top : bottom + 1, bend[0]], changed[bend[1], left : right + 1]):
                line[line == BLACK] = colour if drawn is None else drawn
        return changed

    return {"across": across, "colour": drawn}, solve


@operation("marks", "objects", "noise", "alike_objects", "model")
def between(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour black cells that have coloured ones to the left and right, above and below, either or both."""
    kind, colour = pick(rng, ["row", "column", "either", "both"]), int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        row, column = (
            np.logical_or.accumulate(grid != BLACK, axis=axis)
            & np.flip(np.logical_or.accumulate(np.flip(grid != BLACK, axis), axis=axis), axis)
            for axis in (1, 0)
        )
        where = {"row": row, "column": column, "either": row | column, "both": row & column}[kind]
        return np.where(where & (grid == BLACK), colour, grid)

    return {"kind": kind, "colour": colour}, solve


@operation("noise", "marks")
def enlarge_by_count(rng: Random, colours: Sequence[int]) -> Operation:
    """Make cells blocks with a side as long as there are colours; or put so many copies beside each other."""
    blocks = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        count = len(colours_of(grid))
        if count * max(grid.shape) > 30:
            raise Unfit("too large")
        return np.kron(grid, np.ones((count, count), dtype=int)) if blocks else np.tile(grid, (count, count))

    return {"blocks": blocks}, solve


@operation("noise", "objects", "marks")
def frame_by_count(rng: Random, colours: Sequence[int]) -> Operation:
    """Put a frame around the grid in the colour that is the most or the least common in it."""
    most = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        present = sorted(colours_of(grid))
        counts = [int(np.count_nonzero(grid == colour)) * (1 if most else -1) for colour in present]
        if len(present) < 2:
            raise Unfit("one colour")
        return np.pad(grid, 1, constant_values=present[index_of_best(counts)])

    return {"most": most}, solve
