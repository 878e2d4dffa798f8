"""Operations on cells and their neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import find_objects, neighbours_of
from arc.generation.rules import (
    BLACK,
    CORNERS,
    SIDES,
    Grid,
    Operation,
    Operations,
    Random,
    Unfit,
    pick,
    registering,
)
from arc.generation.scenes import SCENES

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation("marks", "lines", "model")
def stamp(rng: Random, colours: Sequence[int]) -> Operation:
    """Draw a pattern around each cell of one colour, or of two, each having a pattern of its own."""
    patterns = {}
    for colour in colours[:2] if rng.random() < 0.5 else [int(pick(rng, colours))]:
        near = [step for step in SIDES + CORNERS if rng.random() < 0.5]
        if rng.random() < 0.3:
            near += [(2 * down, 2 * right) for down, right in near]
        patterns[int(colour)] = near, (int(rng.integers(1, 10)) if rng.random() < 0.6 else int(colour))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for row, column in zip(*np.nonzero(grid), strict=True):
            near, drawn = patterns.get(int(grid[row, column]), ((), 0))
            for down, right in near:
                r, c = row + down, column + right
                if 0 <= r < grid.shape[0] and 0 <= c < grid.shape[1] and not grid[r, c]:
                    changed[r, c] = drawn
        return changed

    return {"patterns": {str(colour): pattern for colour, pattern in patterns.items()}}, solve


@operation("marks", "objects", "lines", "bars", "dirty_objects", "model", "boxed")
def shoot(rng: Random, colours: Sequence[int]) -> Operation:
    """From each cell of a colour, or of any, draw lines in some directions, to the edge or to what is in the way."""
    steps = [step for step in (SIDES if rng.random() < 0.6 else SIDES + CORNERS) if rng.random() < 0.4]
    steps = steps or [pick(rng, SIDES + CORNERS)]
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None
    drawn = int(rng.integers(1, 10)) if rng.random() < 0.4 else None
    stops, dotted = bool(rng.integers(2)), 1 if rng.random() < 0.8 else 2

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for row, column in zip(*np.nonzero(grid), strict=True):
            colour = int(grid[row, column])
            if only not in (None, colour):
                continue
            for down, right in steps:
                r, c, number = row + down, column + right, 1
                while 0 <= r < grid.shape[0] and 0 <= c < grid.shape[1]:
                    if grid[r, c]:
                        if stops:
                            break
                    elif number % dotted == 0:
                        changed[r, c] = colour if drawn is None else drawn
                    r, c, number = r + down, c + right, number + 1
        return changed

    return {"steps": steps, "only": only, "colour": drawn, "stops": stops, "every": dotted}, solve


@operation("marks", "objects", "model", "table")
def connect(rng: Random, colours: Sequence[int]) -> Operation:
    """Draw lines between cells of one colour in the same row or column."""
    drawn = int(rng.integers(1, 10)) if rng.random() < 0.5 else None
    axes = pick(rng, [(0,), (1,), (0, 1)])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for axis in axes:
            turned, source = (changed.T, grid.T) if axis else (changed, grid)
            for target, line in zip(turned, source, strict=True):
                for colour in set(line.tolist()) - {BLACK}:
                    [places] = np.nonzero(line == colour)
                    between = target[places[0] : places[-1] + 1]
                    between[between == BLACK] = colour if drawn is None else drawn
        return changed

    return {"colour": drawn, "axes": axes}, solve


@operation("marks", "noise", "objects", "lines", "bars")
def fill_lines(rng: Random, colours: Sequence[int]) -> Operation:
    """Fill the rows, columns or both in which some colour is, or in which nothing is."""
    axes, empty = pick(rng, [(0,), (1,), (0, 1)]), bool(rng.random() < 0.3)
    only = int(pick(rng, colours))
    drawn = int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for axis in axes:
            turned, source = (changed.T, grid.T) if axis else (changed, grid)
            hit = ~source.any(axis=1) if empty else (source == only).any(axis=1)
            item = turned[hit]
            item[item == BLACK] = drawn
            turned[hit] = item
        return changed

    return {"axes": axes, "empty": empty, "only": only, "colour": drawn}, solve


@operation("noise", "objects", "dirty_objects", "marks", "lines")
def neighbour_rule(rng: Random, colours: Sequence[int]) -> Operation:
    """Cells that have some number of neighbours get a colour: black ones, coloured ones or those of one colour."""
    corners, black = bool(rng.integers(2)), bool(rng.integers(2))
    least = int(rng.integers(0, 4))
    most = least + int(rng.integers(0, 3))
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None
    drawn = int(rng.integers(1, 10)) if black or rng.random() < 0.6 else BLACK

    def solve(grid: Grid) -> Grid:
        near = neighbours_of(grid != BLACK if only is None else grid == only, corners)
        return np.where((near >= least) & (near <= most) & ((grid == BLACK) == black), drawn, grid)

    return {"corners": corners, "black": black, "from": least, "to": most, "only": only, "colour": drawn}, solve


@operation("noise", "bars", "objects", "periodic", "stacked")
def colour_by_place(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour cells by where they are: every second row, a checkerboard, the edge, a diagonal."""
    kind = pick(rng, ["rows", "columns", "board", "edge", "diagonals", "corners"])
    every, first, drawn = int(rng.integers(2, 4)), int(rng.integers(2)), int(rng.integers(1, 10))
    over = pick(rng, ["black", "coloured", "all"])

    def solve(grid: Grid) -> Grid:
        row, column = np.indices(grid.shape)
        last_row, last_column = grid.shape[0] - 1, grid.shape[1] - 1
        on_rows, on_columns = (row == 0) | (row == last_row), (column == 0) | (column == last_column)
        where = {
            "rows": row % every == first, "columns": column % every == first, "board": (row + column) % 2 == first,
            "edge": on_rows | on_columns, "diagonals": (row == column) | (row + column == last_column),
            "corners": on_rows & on_columns,
        }[kind]  # fmt: skip
        if over != "all":
            where = where & ((grid == BLACK) == (over == "black"))
        return np.where(where, drawn, grid)

    return {"kind": kind, "every": every, "first": first, "colour": drawn, "over": over}, solve


@operation(*SCENES)
def map_colours(rng: Random, colours: Sequence[int]) -> Operation:
    """Give some colours others, or exchange them."""
    table = np.arange(10)
    known = list(dict.fromkeys(int(colour) for colour in colours))
    chosen = [colour for colour in known if rng.random() < 0.7] or known[:1]
    if len(chosen) > 1 and rng.random() < 0.5:
        table[chosen] = np.roll(chosen, 1)
    else:
        table[chosen] = rng.integers(0, 10, size=len(chosen))
    return {"map": table.tolist()}, lambda grid: table[grid]


@operation("noise", "marks", "objects", "symmetric", "bars")
def invert(rng: Random, colours: Sequence[int]) -> Operation:
    """Exchange the background and the one colour that there is."""

    def solve(grid: Grid) -> Grid:
        found = set(grid.ravel().tolist()) - {BLACK}
        if len(found) != 1:
            raise Unfit("not one colour")
        return np.where(grid == BLACK, found.pop(), BLACK)

    return {}, solve


@operation("dirty_objects", "noise")
def clean(rng: Random, colours: Sequence[int]) -> Operation:
    """Take away cells that stand alone, or small objects."""
    corners, limit = bool(rng.integers(2)), int(rng.integers(1, 4))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, True, corners):
            if item.size <= limit:
                changed[item.rows, item.columns] = BLACK
        return changed

    return {"corners": corners, "limit": limit}, solve


@operation("noise", "marks", "bars", "objects", "model")
def fall(rng: Random, colours: Sequence[int]) -> Operation:
    """Let the cells of each column fall, all coloured ones or those of one colour, which the others make room for."""
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        key = grid == only if only is not None else grid != BLACK
        return np.take_along_axis(grid, np.argsort(key, axis=0, kind="stable"), axis=0)

    return {"only": only}, solve
