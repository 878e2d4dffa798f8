"""Operations on the objects of a grid: choose, colour, move, fill and count them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import RANKED, draw_choice, draw_connectivity, find_objects, inside_of, neighbours_of, slide
from arc.generation.rules import BLACK, CORNERS, SIDES, Grid, Operation, Operations, Random, Unfit, pick, registering
from arc.generation.scenes import OBJECT_SCENES

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation(*OBJECT_SCENES, "bars", "marks", "lines", "boxed", "stacked")
def keep_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Keep the chosen objects, or all others."""
    way, (parameters, choose), kept = draw_connectivity(rng), draw_choice(rng), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, *way)
        changed = np.zeros_like(grid) if kept else grid.copy()
        for item in choose(grid, items):
            changed[item.rows, item.columns] = grid[item.rows, item.columns] if kept else BLACK
        return changed

    return {"way": way, **parameters, "keep": kept}, solve


@operation(*OBJECT_SCENES, "bars", "marks", "boxed", "stacked")
def cut_out(rng: Random, colours: Sequence[int]) -> Operation:
    """Cut out the box of the one chosen object."""
    way, (parameters, choose), alone = draw_connectivity(rng), draw_choice(rng), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        chosen = choose(grid, find_objects(grid, *way))
        if len(chosen) != 1:
            raise Unfit("several objects")
        [item] = chosen
        if alone:  # without what else is in its box
            return np.where(item.mask(), grid[item.box], BLACK)
        return grid[item.box]

    return {"way": way, **parameters, "alone": alone}, solve


@operation(*OBJECT_SCENES, "bars", "marks", "lines", "boxed", "stacked")
def recolour_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Give the chosen objects a colour, and the others another one or their own."""
    way, (parameters, choose) = draw_connectivity(rng), draw_choice(rng)
    first, second = (int(colour) for colour in rng.permutation(9)[:2] + 1)
    both = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        changed = np.where(grid != BLACK, second, BLACK) if both else grid.copy()
        for item in choose(grid, find_objects(grid, *way)):
            changed[item.rows, item.columns] = first
        return changed

    return {"way": way, **parameters, "colour": first, "others": second if both else None}, solve


@operation(*OBJECT_SCENES, "bars")
def colour_by_rank(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour objects by the order of something: the first, the second, and so on."""
    way, feature = draw_connectivity(rng), pick(rng, list(RANKED))
    ranks = (rng.permutation(9) + 1).tolist()
    most = int(rng.integers(2, 5))

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, *way)
        values = [RANKED[feature](grid, item) for item in items]
        order = sorted(set(values), reverse=True)
        if not 2 <= len(order) <= most:
            raise Unfit("too few or many ranks")
        changed = np.zeros_like(grid)
        for item, value in zip(items, values, strict=True):
            changed[item.rows, item.columns] = ranks[order.index(value)]
        return changed

    return {"way": way, "of": feature, "colours": ranks[:most]}, solve


@operation(*OBJECT_SCENES, "marks", "bars", "noise")
def colour_by_size(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour objects by their number of cells."""
    way, table = draw_connectivity(rng), (rng.permutation(9) + 1).tolist()
    limit = int(rng.integers(2, 5))

    def solve(grid: Grid) -> Grid:
        changed = np.zeros_like(grid)
        for item in find_objects(grid, *way):
            changed[item.rows, item.columns] = table[min(item.size, limit) - 1]
        return changed

    return {"way": way, "colours": table[:limit]}, solve


@operation("dirty_objects")
def colour_by_touch(rng: Random, colours: Sequence[int]) -> Operation:
    """Give objects the colour of the single cell that touches them, which goes away or stays."""
    corners, stays = bool(rng.integers(2)), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        items, changed = find_objects(grid, True, True), grid.copy()
        cells = np.zeros_like(grid)
        for item in items:
            if item.size == 1:
                cells[item.rows, item.columns] = item.colour
        for item in items:
            if item.size == 1:
                continue
            mask = np.zeros(grid.shape, dtype=bool)
            mask[item.rows, item.columns] = True
            near = (neighbours_of(mask, corners) > 0) & (cells != BLACK)
            touching = set(cells[near].tolist())
            if len(touching) > 1:
                raise Unfit("several colours")
            if touching:
                changed[mask] = touching.pop()
                if not stays:
                    changed[near] = BLACK
        return changed

    return {"corners": corners, "stays": stays}, solve


@operation(*OBJECT_SCENES, "marks", "model")
def move_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Move objects by a step, or as far as they can until the edge or another one; all of them or those of a colour."""
    way = draw_connectivity(rng)
    down, right = pick(rng, SIDES + CORNERS)
    far = bool(rng.integers(2))
    count = int(rng.integers(1, 4))
    colour = int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, *way)
        # Those in front first, so that they are out of the way.
        items.sort(key=lambda item: -max(down * item.rows + right * item.columns))
        changed = grid.copy()
        for item in items:
            if colour not in (None, item.colour):
                continue
            slide(changed, item, (down, right), max(grid.shape) if far else count)
        return changed

    return {"way": way, "down": down, "right": right, "steps": None if far else count, "colour": colour}, solve


@operation(*OBJECT_SCENES, "symmetric", "model")
def turn_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Mirror each object in its own box."""
    way, axis = draw_connectivity(rng), pick(rng, ["left-right", "top-bottom", "both"])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        items = find_objects(grid, *way)
        for item in items:
            changed[item.rows, item.columns] = BLACK
        for item in items:
            cut = np.where(item.mask(), grid[item.box], BLACK)
            cut = cut[:, ::-1] if axis == "left-right" else cut[::-1] if axis == "top-bottom" else cut[::-1, ::-1]
            place = changed[item.box]
            place[cut != BLACK] = cut[cut != BLACK]
        return changed

    return {"way": way, "axis": axis}, solve


@operation(*OBJECT_SCENES, "boxed", "stacked")
def outline(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour the black cells around objects."""
    colour, corners = int(rng.integers(1, 10)), bool(rng.integers(2))
    return {"colour": colour, "corners": corners}, lambda grid: np.where(
        (grid == BLACK) & (neighbours_of(grid != BLACK, corners) > 0), colour, grid
    )


@operation(*OBJECT_SCENES, "marks", "model")
def fill_boxes(rng: Random, colours: Sequence[int]) -> Operation:
    """Fill the box of each object with its colour or another one, behind what is there."""
    way, colour = draw_connectivity(rng), int(rng.integers(1, 10)) if rng.random() < 0.6 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for item in find_objects(grid, *way):
            box = changed[item.box]
            box[box == BLACK] = item.colour if colour is None else colour
        return changed

    return {"way": way, "colour": colour}, solve


@operation(*OBJECT_SCENES, "noise", "boxed")
def fill_inside(rng: Random, colours: Sequence[int]) -> Operation:
    """Colour what is enclosed; or what is not."""
    colour, inside = int(rng.integers(1, 10)), bool(rng.random() < 0.7)
    return {"colour": colour, "inside": inside}, lambda grid: np.where(
        inside_of(grid) if inside else (grid == BLACK) & ~inside_of(grid), colour, grid
    )


@operation(*OBJECT_SCENES)
def hollow(rng: Random, colours: Sequence[int]) -> Operation:
    """Take out the cells inside of objects, or colour them."""
    colour, corners = (0 if rng.random() < 0.4 else int(rng.integers(1, 10))), bool(rng.integers(2))
    return {"colour": colour, "corners": corners}, lambda grid: np.where(
        (grid != BLACK) & (neighbours_of(grid != BLACK, corners) == (8 if corners else 4)), colour, grid
    )


@operation(*OBJECT_SCENES, "marks", "bars", "boxed", "model")
def count_objects(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with a cell for each object: a row, a diagonal, the first cells of a square, or their colours in order."""
    way, colour, form = (
        draw_connectivity(rng),
        int(rng.integers(1, 10)),
        pick(rng, ["row", "diagonal", "square", "colours"]),
    )
    side = 3

    def solve(grid: Grid) -> Grid:
        items = find_objects(grid, *way)
        if not items:
            raise Unfit("no objects")
        if form == "colours":  # one cell of each, the largest first
            sizes = [item.size for item in items]
            if len(set(sizes)) < len(sizes):
                raise Unfit("no order")
            items.sort(key=lambda item: -item.size)
            return np.array([[item.colour for item in items]])
        if form == "diagonal":
            return np.diag(np.full(len(items), colour))
        if form == "row":
            return np.full((1, len(items)), colour)
        if len(items) > side * side:
            raise Unfit("too many")
        changed = np.zeros((side, side), dtype=int)
        changed.flat[: len(items)] = colour
        return changed

    return {"way": way, "colour": colour, "form": form}, solve
