"""Operations on frames and on what they enclose: inside and outside, filled or not, extract, count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import GridObject, box_of, colours_of, find_objects, index_of_best, inside_of
from arc.generation.rules import BLACK, Grid, Operation, Operations, Random, Unfit, pick, registering

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation("objects", "boxed")
def fill_areas(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour what is enclosed by size: the largest or smallest area, even, odd or square ones, or each size up to 4."""
    kind = pick(rng, ["largest", "smallest", "even", "odd", "square", "sizes"])
    table = (rng.permutation(9) + 1).tolist()

    def solve(grid: Grid) -> Grid:
        areas, changed = find_objects(inside_of(grid).astype(int), True, False), grid.copy()
        if kind in ("largest", "smallest"):
            if len(areas) < 2:
                raise Unfit("one area, or none")
            areas = [areas[index_of_best([area.size if kind == "largest" else -area.size for area in areas])]]
        elif kind in ("even", "odd"):
            areas = [area for area in areas if (area.size % 2 == 0) == (kind == "even")]
        elif kind == "square":
            areas = [area for area in areas if {area.size} == {side * side for side in area.mask().shape}]
        for area in areas:
            changed[area.rows, area.columns] = table[min(area.size, 4) - 1 if kind == "sizes" else 0]
        return changed

    return {"kind": kind, "colours": table[: 4 if kind == "sizes" else 1]}, solve


def _frames(grid: Grid) -> list[tuple[GridObject, Grid]]:
    # Objects of one colour that enclose something, and a mask of what, in their boxes.
    found = []
    for item in find_objects(grid, True, False):
        if min(item.mask().shape) > 2 and item.size < item.mask().size:
            hole = inside_of(item.mask().astype(int))
            if hole.any():
                found.append((item, hole))
    if not found:
        raise Unfit("no frames")
    return found


@operation("boxed")
def open_frame(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with what is in the largest or smallest frame, or that with most or fewest coloured cells in it."""
    kind, whole = pick(rng, ["largest", "smallest", "fullest", "emptiest"]), bool(rng.random() < 0.4)

    def solve(grid: Grid) -> Grid:
        frames = _frames(grid)
        sizes = [
            hole.size if kind in ("largest", "smallest") else int(np.count_nonzero(grid[item.box][hole]))
            for item, hole in frames
        ]
        item, hole = frames[index_of_best([-size if kind in ("smallest", "emptiest") else size for size in sizes])]
        return grid[item.box] if whole else np.where(hole, grid[item.box], BLACK)[box_of(hole)]

    return {"kind": kind, "frame": whole}, solve


@operation("boxed")
def empty_frames(rng: Random, colours: Sequence[int]) -> Operation:
    """Take away or colour the cells in frames, or those that are neither frames nor in one."""
    inside, colour = bool(rng.integers(2)), (BLACK if rng.random() < 0.4 else int(rng.integers(1, 10)))

    def solve(grid: Grid) -> Grid:
        enclosed, framing = np.zeros(grid.shape, dtype=bool), np.zeros(grid.shape, dtype=bool)
        for item, hole in _frames(grid):
            enclosed[item.box] |= hole
            framing[item.rows, item.columns] = True
        where = enclosed if inside else ~enclosed & ~framing
        return np.where(where & (grid != BLACK), colour, grid)

    return {"inside": inside, "colour": colour}, solve


@operation("boxed")
def spread_mark(rng: Random, colours: Sequence[int]) -> Operation:
    """Give a frame, or all in it, the colour of the cells in it; or exchange the two colours."""
    kind = pick(rng, ["frame", "inside", "exchange"])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item, hole in _frames(grid):
            inner = grid[item.box][hole]
            found = colours_of(inner)
            if len(found) > 1:
                raise Unfit("several colours")
            if found:
                [colour] = found
                if kind != "inside":
                    changed[item.rows, item.columns] = colour
                if kind == "inside":
                    changed[item.box][hole] = colour
                elif kind == "exchange":
                    changed[item.box][hole] = np.where(inner == BLACK, BLACK, item.colour)
        return changed

    return {"kind": kind}, solve


@operation("boxed")
def count_in_frames(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour frames by how many coloured cells are in them."""
    table = (rng.permutation(9) + 1).tolist()
    most = int(rng.integers(1, 4))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item, hole in _frames(grid):
            inner = np.count_nonzero(grid[item.box][hole])
            changed[item.rows, item.columns] = table[min(inner, most)]
        return changed

    return {"colours": table[: most + 1]}, solve
