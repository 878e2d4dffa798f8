"""Objects of a grid, cells that touch each other: find, measure, choose, move and copy them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.generation.rules import BLACK, CORNERS, SIDES, Grid, Random, Unfit, pick


class GridObject(NamedTuple):
    """An object: cells that touch each other.

    Args:
        rows: of its cells, int (cells,).
        columns: of its cells, int (cells,).
        box: the smallest slices of rows and columns that hold it.
        colour: of its first cell.
    """

    rows: np.ndarray
    columns: np.ndarray
    box: tuple[slice, slice]
    colour: int

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self.rows)

    def mask(self) -> Grid:
        """True where the object has a cell, bool (height, width) of its box."""
        mask = np.zeros([side.stop - side.start for side in self.box], dtype=bool)
        mask[self.rows - self.box[0].start, self.columns - self.box[1].start] = True
        return mask


def find_objects(grid: Grid, by_colour: bool, corners: bool) -> list[GridObject]:
    """Find the objects of a grid, from the top.

    Args:
        grid: cells that are not black belong to objects.
        by_colour: all cells of an object have the same colour.
        corners: cells touch at corners too.
    """
    rows, columns = grid.shape
    cells = grid.ravel().tolist()
    steps = SIDES + CORNERS if corners else SIDES
    seen = [not cell for cell in cells]
    items = []
    for first, colour in enumerate(cells):
        if seen[first]:
            continue
        seen[first] = True
        found = [first]
        for cell in found:
            row, column = divmod(cell, columns)
            for down, right in steps:
                r, c = row + down, column + right
                if 0 <= r < rows and 0 <= c < columns:
                    other = r * columns + c
                    if not seen[other] and (not by_colour or cells[other] == colour):
                        seen[other] = True
                        found.append(other)
        at, across = np.divmod(found, columns)
        box = slice(int(at.min()), int(at.max()) + 1), slice(int(across.min()), int(across.max()) + 1)
        items.append(GridObject(at, across, box, colour))
    return items


def draw_connectivity(rng: Random) -> tuple[bool, bool]:
    """Draw how a rule finds objects: the arguments `by_colour` and `corners` of `find_objects`."""
    return bool(rng.integers(2)), bool(rng.integers(2))


def box_of(mask: Grid) -> tuple[slice, slice]:
    """The smallest slices that hold all cells that are True; there must be one."""
    rows, columns = np.nonzero(mask)
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)


def inside_of(grid: Grid) -> Grid:
    """True at the black cells from which no path of black cells, side by side, leads to the edge."""
    rows, columns = grid.shape
    outside = np.zeros((rows + 2, columns + 2), dtype=bool)
    free = np.ones_like(outside)
    free[1:-1, 1:-1] = grid == BLACK
    outside[0, 0] = True
    while True:
        grown = outside.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= free
        if (grown == outside).all():
            return free[1:-1, 1:-1] & ~outside[1:-1, 1:-1]
        outside = grown


def neighbours_of(mask: Grid, corners: bool) -> Grid:
    """How many neighbours of each cell are True."""
    padded = np.pad(mask.astype(int), 1)
    rows, columns = mask.shape
    steps = SIDES + CORNERS if corners else SIDES
    shifted = (padded[1 + down : 1 + down + rows, 1 + right : 1 + right + columns] for down, right in steps)
    return sum(shifted, np.zeros(mask.shape, dtype=int))


def slide(grid: Grid, item: GridObject, step: tuple[int, int], most: int) -> None:
    """Move an object in the grid itself by up to `most` steps, until the edge or a coloured cell is in the way."""
    values, (rows, columns) = grid[item.rows, item.columns], (item.rows, item.columns)
    grid[rows, columns] = BLACK
    for _ in range(most):
        r, c = rows + step[0], columns + step[1]
        inside = r.min() >= 0 and c.min() >= 0 and r.max() < grid.shape[0] and c.max() < grid.shape[1]
        if not inside or grid[r, c].any():
            break
        rows, columns = r, c
    grid[rows, columns] = values


def _holes(item: GridObject) -> Grid:
    return inside_of(item.mask().astype(int))


def _touches(grid: Grid, item: GridObject) -> bool:
    mask = np.zeros(grid.shape, dtype=bool)
    mask[item.rows, item.columns] = True
    return bool((~mask & (grid != BLACK) & (neighbours_of(mask, True) > 0)).any())


def _at_edge(grid: Grid, item: GridObject) -> bool:
    (rows, columns), (high, wide) = item.box, grid.shape
    return rows.start == 0 or columns.start == 0 or rows.stop == high or columns.stop == wide


RANKED: dict[str, Callable[[Grid, GridObject], int]] = {
    "size": lambda grid, item: item.size,
    "height": lambda grid, item: item.box[0].stop - item.box[0].start,
    "width": lambda grid, item: item.box[1].stop - item.box[1].start,
    "area": lambda grid, item: item.mask().size,
    "top": lambda grid, item: -item.box[0].start,
    "left": lambda grid, item: -item.box[1].start,
    "colours": lambda grid, item: len(set(grid[item.rows, item.columns].tolist())),
    "number of holes": lambda grid, item: len(find_objects(_holes(item).astype(int), True, False)),
}
YES_OR_NO: dict[str, Callable[[Grid, GridObject], bool]] = {
    "holes": lambda grid, item: item.size < item.mask().size and bool(_holes(item).any()),
    "full": lambda grid, item: item.size == item.mask().size,
    "wide": lambda grid, item: item.mask().shape[1] > item.mask().shape[0],
    "symmetric": lambda grid, item: bool((item.mask() == item.mask()[:, ::-1]).all()),
    "edge": _at_edge,
    "square": lambda grid, item: item.mask().shape[0] == item.mask().shape[1],
    "even": lambda grid, item: item.size % 2 == 0,
    "touches": _touches,
}


def draw_choice(rng: Random) -> tuple[dict[str, Any], Callable[[Grid, list[GridObject]], list[GridObject]]]:
    """Draw how a rule chooses some of a grid's objects, such as the largest, the symmetric or the most common ones.

    Returns:
        The parameters, and a function (grid, its objects) -> the chosen objects, never none and never all. It raises
        Unfit where the choice is not clear.
    """
    kind = pick(rng, ["most", "least", "yes", "no", "alone", "common"])
    feature = pick(rng, list(RANKED if kind in ("most", "least") else YES_OR_NO))
    if kind in ("alone", "common"):
        feature = pick(rng, ["colour", "shape", "size"])

    def choose(grid: Grid, items: list[GridObject]) -> list[GridObject]:
        if not items:
            raise Unfit("no objects")
        if kind in ("alone", "common"):
            of = {
                "colour": lambda item: item.colour,
                "shape": lambda item: (item.mask().shape, item.mask().tobytes()),
                "size": lambda item: item.size,
            }[feature]
            values = [of(item) for item in items]
            counts = [values.count(value) for value in values]
            wanted = 1 if kind == "alone" else max(counts)
            chosen = [item for item, count in zip(items, counts, strict=True) if count == wanted]
            distinct = len({v for v, count in zip(values, counts, strict=True) if count == wanted})
            if (kind == "alone" and len(chosen) != 1) or (kind == "common" and (distinct != 1 or wanted == 1)):
                raise Unfit("no single choice")
        else:
            values = [(RANKED | YES_OR_NO)[feature](grid, item) for item in items]
            if kind in ("yes", "no"):
                chosen = [item for item, value in zip(items, values, strict=True) if value == (kind == "yes")]
            else:
                best = (max if kind == "most" else min)(values)
                chosen = [item for item, value in zip(items, values, strict=True) if value == best]
                if len(chosen) != 1:
                    raise Unfit("no single choice")
        if not chosen or len(chosen) == len(items):
            raise Unfit("all objects, or none")
        return chosen

    return {"choice": kind, "of": feature}, choose


def is_inside(grid: Grid, row: int, column: int) -> bool:
    """Whether a cell lies in the grid."""
    return 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]


def index_of_best(values: Sequence[int]) -> int:
    """The index of the highest value; Unfit if two are as high."""
    best = [index for index, value in enumerate(values) if value == max(values)]
    if len(best) != 1:
        raise Unfit("no single choice")
    return best[0]


def colours_of(grid: Grid) -> set[int]:
    """The colours in a grid but the background."""
    return set(grid.ravel().tolist()) - {BLACK}


def paste(grid: Grid, cells: Grid, top: int, left: int) -> None:
    """Draw the coloured cells into the grid itself, where it is black; those beyond its edge are lost."""
    for row, column in zip(*np.nonzero(cells), strict=True):
        r, c = top + int(row), left + int(column)
        if is_inside(grid, r, c) and not grid[r, c]:
            grid[r, c] = cells[row, column]


def cells_of(grid: Grid, item: GridObject) -> Grid:
    """An object's cells in its box; the other cells of the box are black."""
    return np.where(item.mask(), grid[item.box], BLACK)
