"""Operations that complete, copy, align, order and compare objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import (
    GridObject,
    box_of,
    cells_of,
    colours_of,
    draw_connectivity,
    find_objects,
    index_of_best,
    is_inside,
    neighbours_of,
    paste,
    slide,
)
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
from arc.generation.scenes import OBJECT_SCENES
from arc.puzzles.keys import dihedral

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation("objects", "alike_objects", "boxed", "stacked")
def reduce_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Leave of each object its box's frame, corners, middle, first row or first column; or draw that over it."""
    way, kind = draw_connectivity(rng), pick(rng, ["frame", "corners", "middle", "row", "column"])
    over = int(rng.integers(1, 10)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        changed = np.zeros_like(grid) if over is None else grid.copy()
        for item in find_objects(grid, *way):
            box = changed[item.box]
            (last, end), colour = (n - 1 for n in box.shape), item.colour if over is None else over
            if kind == "frame":
                box[[0, -1]] = box[:, [0, -1]] = colour
            elif kind == "corners":
                box[np.ix_([0, -1], [0, -1])] = colour
            elif kind == "middle":
                box[last // 2 : (last + 1) // 2 + 1, end // 2 : (end + 1) // 2 + 1] = colour
            else:
                box[0 if kind == "row" else slice(None), 0 if kind == "column" else slice(None)] = colour
        return changed

    return {"way": way, "kind": kind, "over": over}, solve


@operation("marks", "objects", "alike_objects", "model")
def align(rng: Random, colours: Sequence[int]) -> Operation:
    """Move everything together, to an edge, into a corner or to the middle."""
    places = ["first", "middle", "last", "as it is"]
    down, right = pick(rng, [(down, right) for down in places for right in places][:-1])

    def solve(grid: Grid) -> Grid:
        if not grid.any():
            raise Unfit("nothing to move")
        changed, box, starts = np.zeros_like(grid), box_of(grid != BLACK), []
        for place, side, length in zip((down, right), box, grid.shape, strict=True):
            rest = length - side.stop + side.start
            if place == "middle" and rest % 2:
                raise Unfit("no middle")
            starts.append({"first": 0, "middle": rest // 2, "last": rest, "as it is": side.start}[place])
        paste(changed, grid[box], *starts)
        return changed

    return {"down": down, "right": right}, solve


@operation("dirty_objects", "boxed", "noise")
def smooth(rng: Random, colours: Sequence[int]) -> Operation:
    """Give a cell the colour, black among them, that nearly all of its neighbours have."""
    corners = bool(rng.integers(2))
    least = int(rng.integers(6, 9)) if corners else 4

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for colour in sorted({BLACK, *colours_of(grid)}):
            changed[neighbours_of(grid == colour, corners) >= least] = colour
        return changed

    return {"corners": corners, "least": least}, solve


@operation(*OBJECT_SCENES, "model")
def complete_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Add to each object its mirror images in its own box."""
    way, numbers = draw_connectivity(rng), pick(rng, [(4,), (2,), (2, 4, 6), (6,)])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, *way):
            cut = cells_of(grid, item)
            for number in numbers:
                paste(changed[item.box], dihedral(cut, number), 0, 0)
        return changed

    return {"way": way, "symmetries": numbers}, solve


@operation("model")
def copy_to_marks(rng: Random, colours: Sequence[int]) -> Operation:
    """Copy the one object to the single cells, with its middle or a corner on them, in its colours or theirs."""
    anchor, theirs, moved = pick(rng, ["middle", "corner"]), bool(rng.random() < 0.3), bool(rng.random() < 0.3)

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, False, True)
        models = [item for item in items if item.size > 1]
        if len(models) != 1 or len(items) < 2:
            raise Unfit("no single object, or no marks")
        cut, changed = cells_of(grid, models[0]), np.zeros_like(grid)
        back = [n // 2 if anchor == "middle" else 0 for n in cut.shape]
        for item in items:
            if item.size == 1:
                copied = np.where(cut != BLACK, item.colour, BLACK) if theirs else cut
                paste(changed, copied, int(item.rows[0]) - back[0], int(item.columns[0]) - back[1])
        return changed if moved else np.where(changed == BLACK, grid, changed)

    return {"anchor": anchor, "theirs": theirs, "moved": moved}, solve


@operation("objects", "alike_objects", "model")
def repeat_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Copy each object beside itself in one direction, once or again and again until the edge."""
    way, (down, right), gap = draw_connectivity(rng), pick(rng, SIDES + CORNERS), int(rng.integers(0, 2))
    once, recolour = bool(rng.integers(2)), int(rng.integers(1, 10)) if rng.random() < 0.3 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, *way):
            cut = cells_of(grid, item)
            if recolour is not None:
                cut = np.where(cut != BLACK, recolour, BLACK)
            for number in range(1, 2 if once else max(grid.shape) + 1):
                top, left = (
                    side.start + number * step * (n + gap)
                    for side, step, n in zip(item.box, (down, right), cut.shape, strict=True)
                )
                paste(changed, cut, top, left)
        return changed

    return {"way": way, "down": down, "right": right, "gap": gap, "once": once, "colour": recolour}, solve


@operation("objects", "alike_objects", "model")
def reflect_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Add to each object its mirror image in one of its own sides."""
    way, (down, right) = draw_connectivity(rng), pick(rng, SIDES)

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, *way):
            cut = cells_of(grid, item)
            top, left = item.box[0].start + down * len(cut), item.box[1].start + right * cut.shape[1]
            paste(changed, cut[::-1] if down else cut[:, ::-1], top, left)
        return changed

    return {"way": way, "down": down, "right": right}, solve


def _step_to(aim: GridObject, item: GridObject) -> tuple[int, int] | None:
    # The direction in which an object has the aim before it: in its columns, else in its rows, by the nearest cells.
    cells, aims = (list(zip(each.rows.tolist(), each.columns.tolist(), strict=True)) for each in (item, aim))
    for axis in (0, 1):
        ahead = [to[axis] - cell[axis] for cell in cells for to in aims if to[1 - axis] == cell[1 - axis]]
        if ahead:
            step = 1 if min(ahead, key=abs) > 0 else -1
            return (step, 0) if axis == 0 else (0, step)
    return None


@operation("objects", "dirty_objects", "model", "marks")
def approach(rng: Random, colours: Sequence[int]) -> Operation:
    """Move objects in their rows or columns until they touch the largest one, or the one of a colour."""
    way, colour = draw_connectivity(rng), int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        items, changed = find_objects(grid, *way), grid.copy()
        if not items:
            raise Unfit("no objects")
        aim = items.pop(index_of_best([item.size if colour is None else item.colour == colour for item in items]))
        away = [
            int(abs(item.rows - aim.rows[:, None]).min() + abs(item.columns - aim.columns[:, None]).min())
            for item in items
        ]
        for _, item in sorted(zip(away, items, strict=True), key=lambda pair: pair[0]):
            step = _step_to(aim, item)
            if step:
                slide(changed, item, step, max(grid.shape))
        return changed

    return {"way": way, "colour": colour}, solve


@operation("marks", "objects", "model")
def reach_edge(rng: Random, colours: Sequence[int]) -> Operation:
    """Draw a line from each object to the edge that is nearest to it, or move it there; not where two are as near."""
    way, moved = draw_connectivity(rng), bool(rng.integers(2))
    colour = int(rng.integers(1, 10)) if not moved and rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        items, changed, steps = find_objects(grid, *way), grid.copy(), []
        for item in items:
            (rows, columns), (high, wide) = item.box, grid.shape
            away = {
                (-1, 0): rows.start, (1, 0): high - rows.stop, (0, -1): columns.start, (0, 1): wide - columns.stop,
            }  # fmt: skip
            near = sorted(away.values())
            distance = near[0] if near[0] < near[1] else 0
            steps.append((distance, min(away, key=away.__getitem__)))
        for (distance, step), item in sorted(zip(steps, items, strict=True), key=lambda pair: pair[0][0]):
            if moved:
                slide(changed, item, step, distance)
                continue
            for row, column in zip(item.rows.tolist(), item.columns.tolist(), strict=True):
                for r, c in ((row + n * step[0], column + n * step[1]) for n in range(1, max(grid.shape)) if distance):
                    if is_inside(grid, r, c) and not grid[r, c]:
                        changed[r, c] = grid[row, column] if colour is None else colour
        return changed

    return {"way": way, "moved": moved, "colour": colour}, solve


@operation("objects", "alike_objects", "boxed")
def collect_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with the objects alone, side by side or below each other, by where they begin or by size."""
    way, below, by = draw_connectivity(rng), bool(rng.integers(2)), pick(rng, ["place", "size", "less"])
    gap = int(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        items, axis = find_objects(grid, *way), 0 if below else 1
        values = [item.box[axis].start if by == "place" else item.size * (1 if by == "less" else -1) for item in items]
        if len(items) < 2 or len(set(values)) < len(values):
            raise Unfit("no order")
        order = [item for _, item in sorted(zip(values, items, strict=True), key=lambda pair: pair[0])]
        cuts = [cells_of(grid, item).T if below else cells_of(grid, item) for item in order]
        changed = np.zeros((max(len(cut) for cut in cuts), sum(cut.shape[1] + gap for cut in cuts) - gap), dtype=int)
        left = 0
        for cut in cuts:  # on one edge
            changed[: len(cut), left : left + cut.shape[1]] = cut
            left += cut.shape[1] + gap
        return changed.T if below else changed

    return {"way": way, "below": below, "by": by, "gap": gap}, solve


@operation(*OBJECT_SCENES, "marks", "bars")
def list_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with one cell of each object, in the order of where they begin."""
    way, axis, reverse, row = (
        draw_connectivity(rng),
        int(rng.integers(2)),
        bool(rng.random() < 0.3),
        bool(rng.integers(2)),
    )

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, *way)
        starts = [item.box[axis].start for item in items]
        if len(items) < 2 or len(set(starts)) < len(items):
            raise Unfit("no order")
        items.sort(key=lambda item: item.box[axis].start, reverse=reverse)
        listed = np.array([[item.colour for item in items]])
        return listed if row else listed.T

    return {"way": way, "axis": axis, "reverse": reverse, "row": row}, solve


@operation("alike_objects")
def colour_like(rng: Random, colours: Sequence[int]) -> Operation:
    """Give objects of the same shape as one of a colour this colour, or another one to those of other shapes."""
    colour, other = (int(pick(rng, colours)), int(rng.integers(1, 10)) if rng.random() < 0.4 else None)
    turned = bool(rng.random() < 0.3)  # turned and mirrored it is the same shape

    def shape(item: GridObject) -> tuple:
        masks = [dihedral(item.mask(), number) for number in range(8 if turned else 1)]
        return min((mask.shape, mask.tobytes()) for mask in masks)

    def solve(grid: Grid) -> Grid:
        items, changed = find_objects(grid, True, True), grid.copy()
        shapes = {shape(item) for item in items if item.colour == colour}
        if not shapes:
            raise Unfit("no model")
        for item in items:
            like = shape(item) in shapes
            if like == (other is None):
                changed[item.rows, item.columns] = colour if like else other
        return changed

    return {"like": colour, "others": other, "turned": turned}, solve


@operation(*OBJECT_SCENES, "marks", "boxed", "stacked")
def swell(rng: Random, colours: Sequence[int]) -> Operation:
    """Let objects grow by one cell where no two colours meet, or take away their outermost cells."""
    grown, corners = bool(rng.random() < 0.6), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        if not grown:
            return np.where(neighbours_of(grid == BLACK, corners) > 0, BLACK, grid)
        near = {colour: neighbours_of(grid == colour, corners) > 0 for colour in sorted(colours_of(grid))}
        one = (grid == BLACK) & (sum(near.values(), np.zeros_like(grid)) == 1)
        return grid + sum((colour * (where & one) for colour, where in near.items()), np.zeros_like(grid))

    return {"grown": grown, "corners": corners}, solve


@operation("objects", "alike_objects", "boxed", "stacked")
def pattern_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Give each object's cells a pattern of its box: rows, columns, a checkerboard, rings, diagonals."""
    way, kind = draw_connectivity(rng), pick(rng, ["rows", "columns", "board", "rings", "diagonals"])
    colour, first = (BLACK if rng.random() < 0.3 else int(rng.integers(1, 10))), int(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, *way):
            row, column = item.rows - item.box[0].start, item.columns - item.box[1].start
            last, end = (side.stop - side.start - 1 for side in item.box)
            if kind == "diagonals":
                where = (row == column) | (row + column == end)
            else:
                rings = np.minimum.reduce([row, column, last - row, end - column])
                where = {"rows": row, "columns": column, "board": row + column, "rings": rings}[kind] % 2 == first
            changed[item.rows[where], item.columns[where]] = colour
        return changed

    return {"way": way, "kind": kind, "colour": colour, "first": first}, solve
