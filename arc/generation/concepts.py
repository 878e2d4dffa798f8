"""More operations for programs.py, which registers them: what ConceptARC's groups of concepts lacked there.

ConceptARC (Moskvichev, Odouard and Mitchell 2023, https://arxiv.org/abs/2305.07141) lists 16 groups: above and below,
centre, clean up, complete a shape, copy, count, extend to a boundary, extract, filled or not, horizontal and vertical,
inside and outside, move to a boundary, order, same and different, what is on top in two and in three dimensions. The
list was read, not its tasks. The sections below say which groups they are about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.families import Grid, Random, pick
from arc.generation.programs import (
    BLACK,
    CORNERS,
    OBJECTS,
    SIDES,
    Made,
    Part,
    Unfit,
    box_of,
    draw_way,
    inside_of,
    neighbours_of,
    operation,
    parts_of,
    slide,
)
from arc.puzzles.keys import dihedral

LEGIBLE = 10  # cells from which bent lines begin: of more nobody could tell them apart


def _inside(grid: Grid, row: int, column: int) -> bool:
    return 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]


def _single(values: Sequence[int]) -> int:
    # The place of the highest value.
    best = [place for place, value in enumerate(values) if value == max(values)]
    if len(best) != 1:
        raise Unfit("no single choice")
    return best[0]


def _colours_of(grid: Grid) -> set[int]:
    return set(grid.ravel().tolist()) - {BLACK}


def _paste(grid: Grid, part: Grid, top: int, left: int) -> None:
    # Draw a part where the grid is black; what would be beyond its edge is lost.
    for row, column in zip(*np.nonzero(part), strict=True):
        r, c = top + int(row), left + int(column)
        if _inside(grid, r, c) and not grid[r, c]:
            grid[r, c] = part[row, column]


def _step_to(aim: Part, part: Part) -> tuple[int, int] | None:
    # The direction in which a part has the aim before it: in its columns, else in its rows, by the nearest cells.
    cells, aims = (list(zip(each.rows.tolist(), each.columns.tolist(), strict=True)) for each in (part, aim))
    for axis in (0, 1):
        ahead = [to[axis] - cell[axis] for cell in cells for to in aims if to[1 - axis] == cell[1 - axis]]
        if ahead:
            step = 1 if min(ahead, key=abs) > 0 else -1
            return (step, 0) if axis == 0 else (0, step)
    return None


def _cut(grid: Grid, part: Part) -> Grid:
    return np.where(part.mask(), grid[part.box], BLACK)


# ---------------------------------------------------------------------------------------------------------------------
# A line across the grid: above and below, horizontal and vertical, extend and move to a boundary


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
def side_of_line(rng: Random, colours: Sequence[int]) -> Made:
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
def copy_over_line(rng: Random, colours: Sequence[int]) -> Made:
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
def move_to_line(rng: Random, colours: Sequence[int]) -> Made:
    """Move objects until the line, or from it until the edge."""
    way, towards = draw_way(rng), bool(rng.random() < 0.6)

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        upright, at = _line(grid)
        turned, rest = (changed.T, grid.T.copy()) if upright else (changed, grid.copy())
        rest[at] = BLACK
        parts = parts_of(rest, *way)
        parts.sort(key=lambda part: int(abs(part.rows - at).min()) * (1 if towards else -1))
        for part in parts:
            slide(turned, part, (1 if (part.rows[0] < at) == towards else -1, 0), max(grid.shape))
        return changed

    return {"way": way, "towards": towards}, solve


@operation("divided", "lines")
def reach_line(rng: Random, colours: Sequence[int]) -> Made:
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


# ---------------------------------------------------------------------------------------------------------------------
# Objects: centre, clean up, complete a shape, copy, move to a boundary, order, same and different


@operation("objects", "alike_objects", "boxed", "stacked")
def reduce_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Leave of each object its box's frame, corners, middle, first row or first column; or draw that over it."""
    way, kind = draw_way(rng), pick(rng, ["frame", "corners", "middle", "row", "column"])
    over = int(rng.integers(1, 10)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        changed = np.zeros_like(grid) if over is None else grid.copy()
        for part in parts_of(grid, *way):
            box = changed[part.box]
            (last, end), colour = (n - 1 for n in box.shape), part.colour if over is None else over
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
def align(rng: Random, colours: Sequence[int]) -> Made:
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
        _paste(changed, grid[box], *starts)
        return changed

    return {"down": down, "right": right}, solve


@operation("dirty_objects", "boxed", "noise")
def smooth(rng: Random, colours: Sequence[int]) -> Made:
    """Give a cell the colour, black among them, that nearly all of its neighbours have."""
    corners = bool(rng.integers(2))
    least = int(rng.integers(6, 9)) if corners else 4

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for colour in sorted({BLACK, *_colours_of(grid)}):
            changed[neighbours_of(grid == colour, corners) >= least] = colour
        return changed

    return {"corners": corners, "least": least}, solve


@operation(*OBJECTS, "model")
def complete_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Add to each object its mirror images in its own box."""
    way, numbers = draw_way(rng), pick(rng, [(4,), (2,), (2, 4, 6), (6,)])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, *way):
            cut = _cut(grid, part)
            for number in numbers:
                _paste(changed[part.box], dihedral(cut, number), 0, 0)
        return changed

    return {"way": way, "symmetries": numbers}, solve


@operation("model")
def copy_to_marks(rng: Random, colours: Sequence[int]) -> Made:
    """Copy the one object to the single cells, with its middle or a corner on them, in its colours or theirs."""
    anchor, theirs, moved = pick(rng, ["middle", "corner"]), bool(rng.random() < 0.3), bool(rng.random() < 0.3)

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, False, True)
        models = [part for part in parts if part.size > 1]
        if len(models) != 1 or len(parts) < 2:
            raise Unfit("no single object, or no marks")
        cut, changed = _cut(grid, models[0]), np.zeros_like(grid)
        back = [n // 2 if anchor == "middle" else 0 for n in cut.shape]
        for part in parts:
            if part.size == 1:
                copied = np.where(cut != BLACK, part.colour, BLACK) if theirs else cut
                _paste(changed, copied, int(part.rows[0]) - back[0], int(part.columns[0]) - back[1])
        return changed if moved else np.where(changed == BLACK, grid, changed)

    return {"anchor": anchor, "theirs": theirs, "moved": moved}, solve


@operation("objects", "alike_objects", "model")
def repeat_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Copy each object beside itself in one direction, once or again and again until the edge."""
    way, (down, right), gap = draw_way(rng), pick(rng, SIDES + CORNERS), int(rng.integers(0, 2))
    once, recolour = bool(rng.integers(2)), int(rng.integers(1, 10)) if rng.random() < 0.3 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, *way):
            cut = _cut(grid, part)
            if recolour is not None:
                cut = np.where(cut != BLACK, recolour, BLACK)
            for number in range(1, 2 if once else max(grid.shape) + 1):
                top, left = (
                    side.start + number * step * (n + gap)
                    for side, step, n in zip(part.box, (down, right), cut.shape, strict=True)
                )
                _paste(changed, cut, top, left)
        return changed

    return {"way": way, "down": down, "right": right, "gap": gap, "once": once, "colour": recolour}, solve


@operation("objects", "alike_objects", "model")
def reflect_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Add to each object its mirror image in one of its own sides."""
    way, (down, right) = draw_way(rng), pick(rng, SIDES)

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, *way):
            cut = _cut(grid, part)
            top, left = part.box[0].start + down * len(cut), part.box[1].start + right * cut.shape[1]
            _paste(changed, cut[::-1] if down else cut[:, ::-1], top, left)
        return changed

    return {"way": way, "down": down, "right": right}, solve


@operation("objects", "dirty_objects", "model", "marks")
def approach(rng: Random, colours: Sequence[int]) -> Made:
    """Move objects in their rows or columns until they touch the largest one, or the one of a colour."""
    way, colour = draw_way(rng), int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        parts, changed = parts_of(grid, *way), grid.copy()
        if not parts:
            raise Unfit("no objects")
        aim = parts.pop(_single([part.size if colour is None else part.colour == colour for part in parts]))
        away = [
            int(abs(part.rows - aim.rows[:, None]).min() + abs(part.columns - aim.columns[:, None]).min())
            for part in parts
        ]
        for _, part in sorted(zip(away, parts, strict=True), key=lambda pair: pair[0]):
            step = _step_to(aim, part)
            if step:
                slide(changed, part, step, max(grid.shape))
        return changed

    return {"way": way, "colour": colour}, solve


@operation("marks", "objects", "model")
def reach_edge(rng: Random, colours: Sequence[int]) -> Made:
    """Draw a line from each object to the edge that is nearest to it, or move it there; not where two are as near."""
    way, moved = draw_way(rng), bool(rng.integers(2))
    colour = int(rng.integers(1, 10)) if not moved and rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        parts, changed, steps = parts_of(grid, *way), grid.copy(), []
        for part in parts:
            (rows, columns), (high, wide) = part.box, grid.shape
            away = {
                (-1, 0): rows.start, (1, 0): high - rows.stop, (0, -1): columns.start, (0, 1): wide - columns.stop,
            }  # fmt: skip
            near = sorted(away.values())
            distance = near[0] if near[0] < near[1] else 0
            steps.append((distance, min(away, key=away.__getitem__)))
        for (distance, step), part in sorted(zip(steps, parts, strict=True), key=lambda pair: pair[0][0]):
            if moved:
                slide(changed, part, step, distance)
                continue
            for row, column in zip(part.rows.tolist(), part.columns.tolist(), strict=True):
                for r, c in ((row + n * step[0], column + n * step[1]) for n in range(1, max(grid.shape)) if distance):
                    if _inside(grid, r, c) and not grid[r, c]:
                        changed[r, c] = grid[row, column] if colour is None else colour
        return changed

    return {"way": way, "moved": moved, "colour": colour}, solve


@operation("objects", "alike_objects", "boxed")
def collect_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with the objects alone, side by side or below each other, by where they begin or by size."""
    way, below, by = draw_way(rng), bool(rng.integers(2)), pick(rng, ["place", "size", "less"])
    gap = int(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        parts, axis = parts_of(grid, *way), 0 if below else 1
        values = [part.box[axis].start if by == "place" else part.size * (1 if by == "less" else -1) for part in parts]
        if len(parts) < 2 or len(set(values)) < len(values):
            raise Unfit("no order")
        order = [part for _, part in sorted(zip(values, parts, strict=True), key=lambda pair: pair[0])]
        cuts = [_cut(grid, part).T if below else _cut(grid, part) for part in order]
        changed = np.zeros((max(len(cut) for cut in cuts), sum(cut.shape[1] + gap for cut in cuts) - gap), dtype=int)
        left = 0
        for cut in cuts:  # on one edge
            changed[: len(cut), left : left + cut.shape[1]] = cut
            left += cut.shape[1] + gap
        return changed.T if below else changed

    return {"way": way, "below": below, "by": by, "gap": gap}, solve


@operation(*OBJECTS, "marks", "bars")
def list_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with one cell of each object, in the order of where they begin."""
    way, axis, reverse, row = draw_way(rng), int(rng.integers(2)), bool(rng.random() < 0.3), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, *way)
        starts = [part.box[axis].start for part in parts]
        if len(parts) < 2 or len(set(starts)) < len(parts):
            raise Unfit("no order")
        parts.sort(key=lambda part: part.box[axis].start, reverse=reverse)
        listed = np.array([[part.colour for part in parts]])
        return listed if row else listed.T

    return {"way": way, "axis": axis, "reverse": reverse, "row": row}, solve


@operation("alike_objects")
def colour_like(rng: Random, colours: Sequence[int]) -> Made:
    """Give objects of the same shape as one of a colour this colour, or another one to those of other shapes."""
    colour, other = (int(pick(rng, colours)), int(rng.integers(1, 10)) if rng.random() < 0.4 else None)
    turned = bool(rng.random() < 0.3)  # turned and mirrored it is the same shape

    def shape(part: Part) -> tuple:
        masks = [dihedral(part.mask(), number) for number in range(8 if turned else 1)]
        return min((mask.shape, mask.tobytes()) for mask in masks)

    def solve(grid: Grid) -> Grid:
        parts, changed = parts_of(grid, True, True), grid.copy()
        shapes = {shape(part) for part in parts if part.colour == colour}
        if not shapes:
            raise Unfit("no model")
        for part in parts:
            like = shape(part) in shapes
            if like == (other is None):
                changed[part.rows, part.columns] = colour if like else other
        return changed

    return {"like": colour, "others": other, "turned": turned}, solve


@operation(*OBJECTS, "marks", "boxed", "stacked")
def swell(rng: Random, colours: Sequence[int]) -> Made:
    """Let objects grow by one cell where no two colours meet, or take away their outermost cells."""
    grown, corners = bool(rng.random() < 0.6), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        if not grown:
            return np.where(neighbours_of(grid == BLACK, corners) > 0, BLACK, grid)
        near = {colour: neighbours_of(grid == colour, corners) > 0 for colour in sorted(_colours_of(grid))}
        one = (grid == BLACK) & (sum(near.values(), np.zeros_like(grid)) == 1)
        return grid + sum((colour * (where & one) for colour, where in near.items()), np.zeros_like(grid))

    return {"grown": grown, "corners": corners}, solve


@operation("objects", "alike_objects", "boxed", "stacked")
def pattern_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Give each object's cells a pattern of its box: rows, columns, a checkerboard, rings, diagonals."""
    way, kind = draw_way(rng), pick(rng, ["rows", "columns", "board", "rings", "diagonals"])
    colour, first = (BLACK if rng.random() < 0.3 else int(rng.integers(1, 10))), int(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, *way):
            row, column = part.rows - part.box[0].start, part.columns - part.box[1].start
            last, end = (side.stop - side.start - 1 for side in part.box)
            if kind == "diagonals":
                where = (row == column) | (row + column == end)
            else:
                rings = np.minimum.reduce([row, column, last - row, end - column])
                where = {"rows": row, "columns": column, "board": row + column, "rings": rings}[kind] % 2 == first
            changed[part.rows[where], part.columns[where]] = colour
        return changed

    return {"way": way, "kind": kind, "colour": colour, "first": first}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Frames and what is enclosed: inside and outside, filled or not, extract, count


@operation("objects", "boxed")
def fill_areas(rng: Random, colours: Sequence[int]) -> Made:
    """Colour what is enclosed by size: the largest or smallest area, even, odd or square ones, or each size up to 4."""
    kind = pick(rng, ["largest", "smallest", "even", "odd", "square", "sizes"])
    table = (rng.permutation(9) + 1).tolist()

    def solve(grid: Grid) -> Grid:
        areas, changed = parts_of(inside_of(grid).astype(int), True, False), grid.copy()
        if kind in ("largest", "smallest"):
            if len(areas) < 2:
                raise Unfit("one area, or none")
            areas = [areas[_single([area.size if kind == "largest" else -area.size for area in areas])]]
        elif kind in ("even", "odd"):
            areas = [area for area in areas if (area.size % 2 == 0) == (kind == "even")]
        elif kind == "square":
            areas = [area for area in areas if {area.size} == {side * side for side in area.mask().shape}]
        for area in areas:
            changed[area.rows, area.columns] = table[min(area.size, 4) - 1 if kind == "sizes" else 0]
        return changed

    return {"kind": kind, "colours": table[: 4 if kind == "sizes" else 1]}, solve


def _frames(grid: Grid) -> list[tuple[Part, Grid]]:
    # Objects of one colour that enclose something, and a mask of what, in their boxes.
    found = []
    for part in parts_of(grid, True, False):
        if min(part.mask().shape) > 2 and part.size < part.mask().size:
            hole = inside_of(part.mask().astype(int))
            if hole.any():
                found.append((part, hole))
    if not found:
        raise Unfit("no frames")
    return found


@operation("boxed")
def open_frame(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with what is in the largest or smallest frame, or that with most or fewest coloured cells in it."""
    kind, whole = pick(rng, ["largest", "smallest", "fullest", "emptiest"]), bool(rng.random() < 0.4)

    def solve(grid: Grid) -> Grid:
        frames = _frames(grid)
        sizes = [
            hole.size if kind in ("largest", "smallest") else int(np.count_nonzero(grid[part.box][hole]))
            for part, hole in frames
        ]
        part, hole = frames[_single([-size if kind in ("smallest", "emptiest") else size for size in sizes])]
        return grid[part.box] if whole else np.where(hole, grid[part.box], BLACK)[box_of(hole)]

    return {"kind": kind, "frame": whole}, solve


@operation("boxed")
def empty_frames(rng: Random, colours: Sequence[int]) -> Made:
    """Take away or colour the cells in frames, or those that are neither frames nor in one."""
    inside, colour = bool(rng.integers(2)), (BLACK if rng.random() < 0.4 else int(rng.integers(1, 10)))

    def solve(grid: Grid) -> Grid:
        enclosed, framing = np.zeros(grid.shape, dtype=bool), np.zeros(grid.shape, dtype=bool)
        for part, hole in _frames(grid):
            enclosed[part.box] |= hole
            framing[part.rows, part.columns] = True
        where = enclosed if inside else ~enclosed & ~framing
        return np.where(where & (grid != BLACK), colour, grid)

    return {"inside": inside, "colour": colour}, solve


@operation("boxed")
def spread_mark(rng: Random, colours: Sequence[int]) -> Made:
    """Give a frame, or all in it, the colour of the cells in it; or exchange the two colours."""
    kind = pick(rng, ["frame", "inside", "exchange"])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part, hole in _frames(grid):
            inner = grid[part.box][hole]
            found = _colours_of(inner)
            if len(found) > 1:
                raise Unfit("several colours")
            if found:
                [colour] = found
                if kind != "inside":
                    changed[part.rows, part.columns] = colour
                if kind == "inside":
                    changed[part.box][hole] = colour
                elif kind == "exchange":
                    changed[part.box][hole] = np.where(inner == BLACK, BLACK, part.colour)
        return changed

    return {"kind": kind}, solve


@operation("boxed")
def count_in_frames(rng: Random, colours: Sequence[int]) -> Made:
    """Colour frames by how many coloured cells are in them."""
    table = (rng.permutation(9) + 1).tolist()
    most = int(rng.integers(1, 4))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part, hole in _frames(grid):
            inner = np.count_nonzero(grid[part.box][hole])
            changed[part.rows, part.columns] = table[min(inner, most)]
        return changed

    return {"colours": table[: most + 1]}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Boxes over each other: what is on top in three dimensions, order


def _layers(grid: Grid) -> list[tuple[int, tuple[slice, slice]]]:
    # Colours and their boxes, from the lowest: in the box of one on top no other colour is to be seen.
    left = {colour: box_of(grid == colour) for colour in sorted(_colours_of(grid))}
    layers: list[tuple[int, tuple[slice, slice]]] = []
    while left:
        top = [colour for colour, box in left.items() if not (_colours_of(grid[box]) & {*left}) - {colour}]
        if len(top) != 1:
            raise Unfit("no order")
        layers.insert(0, (top[0], left.pop(top[0])))
    if len(layers) < 2:
        raise Unfit("nothing is over anything")
    return layers


@operation("stacked")
def list_layers(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with the colour on top, the lowest one, or all in their order."""
    kind, row = pick(rng, ["top", "lowest", "down", "up"]), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        order = [colour for colour, _ in _layers(grid)]  # upwards
        listed = {"top": order[-1:], "lowest": order[:1], "down": order[::-1], "up": order}[kind]
        return np.array([listed]) if row else np.array([listed]).T

    return {"kind": kind, "row": row}, solve


@operation("stacked")
def restack(rng: Random, colours: Sequence[int]) -> Made:
    """Bring the lowest box to the top, take the topmost away, or turn the order round."""
    kind = pick(rng, ["raise", "lift", "reverse"])

    def solve(grid: Grid) -> Grid:
        layers, changed = _layers(grid), np.zeros_like(grid)
        for colour, box in {"raise": [*layers[1:], layers[0]], "lift": layers[:-1], "reverse": layers[::-1]}[kind]:
            changed[box] = colour
        return changed

    return {"kind": kind}, solve


@operation("stacked")
def exchange_layers(rng: Random, colours: Sequence[int]) -> Made:
    """Give each box the colour of the next one, or the colours in reverse order."""
    reverse = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        order, table = [colour for colour, _ in _layers(grid)], np.arange(10)
        table[order] = order[::-1] if reverse else [*order[1:], order[0]]
        return table[grid]

    return {"reverse": reverse}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Panels in rows and columns: same and different, copy, count


def _panel_boxes(grid: Grid) -> list[list[tuple[slice, slice]]]:
    # Where the equal parts between the whole rows and columns of one colour are.
    for colour in sorted(_colours_of(grid)):
        spans = []
        for axis in (1, 0):
            cuts = [-1, *np.nonzero((grid == colour).all(axis=axis))[0].tolist(), grid.shape[1 - axis]]
            spans.append([slice(begin + 1, end) for begin, end in zip(cuts, cuts[1:], strict=False)])
        sizes = [{span.stop - span.start for span in along} for along in spans]
        if all(len(size) == 1 and min(size) > 0 for size in sizes) and len(spans[0]) * len(spans[1]) > 1:
            return [[(down, right) for right in spans[1]] for down in spans[0]]
    raise Unfit("no panels")


@operation("table")
def summarise_panels(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with one cell for each panel: its colour, or whether it has cells, is full, fullest or odd in number."""
    kind, colour = pick(rng, ["colour", "any", "full", "fullest", "odd"]), int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        boxes = _panel_boxes(grid)
        counts = np.array([[np.bincount(grid[box].ravel(), minlength=10) for box in row] for row in boxes])
        black, cells = counts[..., BLACK], counts[..., 1:].sum(axis=-1)
        if kind == "colour":
            best = np.sort(counts[..., 1:], axis=-1)
            if ((best[..., -1] == best[..., -2]) & (cells > 0)).any():
                raise Unfit("no single colour")
            return np.where(cells > 0, counts[..., 1:].argmax(axis=-1) + 1, BLACK)
        where = {"any": cells > 0, "full": black == 0, "fullest": cells == cells.max(), "odd": cells % 2 == 1}[kind]
        return np.where(where, colour, BLACK)

    return {"kind": kind, "colour": None if kind == "colour" else colour}, solve


@operation("table")
def odd_panel(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with the panel that is unlike all others, or has most or fewest coloured cells."""
    kind = pick(rng, ["unlike", "fullest", "emptiest"])

    def solve(grid: Grid) -> Grid:
        parts = [grid[box] for row in _panel_boxes(grid) for box in row]
        if kind == "unlike":
            texts = [part.tobytes() for part in parts]
            if len({*texts}) != 2:
                raise Unfit("no two kinds")
            return parts[_single([-texts.count(text) for text in texts])]
        return parts[_single([np.count_nonzero(part) * (1 if kind == "fullest" else -1) for part in parts])]

    return {"kind": kind}, solve


@operation("table")
def fill_panels(rng: Random, colours: Sequence[int]) -> Made:
    """Show in all panels what any has (the first on top), mirrored in the lines or not; or fill the fullest or used."""
    kind, colour = pick(rng, ["overlay", "mirror", "fullest", "used"]), int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        changed, places = grid.copy(), []
        for row, line in enumerate(_panel_boxes(grid)):
            places += [
                (box, row % 2 * 2 + column % 2 * 4 if kind == "mirror" else 0) for column, box in enumerate(line)
            ]
        if kind in ("fullest", "used"):
            counts = [np.count_nonzero(grid[box]) for box, _ in places]
            for (box, _), count in zip(places, counts, strict=True):
                if count >= (1 if kind == "used" else max(counts)):
                    changed[box] = colour
            return changed
        shown = np.zeros_like(grid[places[0][0]])
        for box, symmetry in places:
            shown = np.where(shown == BLACK, dihedral(grid[box], symmetry), shown)
        for box, symmetry in places:
            changed[box] = dihedral(shown, symmetry)
        return changed

    return {"kind": kind, "colour": colour if kind in ("fullest", "used") else None}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Single cells: extend to a boundary, horizontal and vertical, count


@operation("marks")
def bounce(rng: Random, colours: Sequence[int]) -> Made:
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
def stairs(rng: Random, colours: Sequence[int]) -> Made:
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
                if not _inside(grid, r, c):
                    break
                if not grid[r, c]:
                    changed[r, c] = grid[row, column] if drawn is None else drawn
        return changed

    return {"only": only, "steps": steps, "colour": drawn}, solve


@operation("marks", "model")
def crossings(rng: Random, colours: Sequence[int]) -> Made:
    """Colour the black cells where the row of one cell and the column of another cross."""
    colour, only = int(rng.integers(1, 10)), int(pick(rng, colours)) if rng.random() < 0.3 else None

    def solve(grid: Grid) -> Grid:
        cells = grid != BLACK if only is None else grid == only
        return np.where((grid == BLACK) & cells.any(axis=1)[:, None] & cells.any(axis=0), colour, grid)

    return {"colour": colour, "only": only}, solve


@operation("marks")
def connect_bent(rng: Random, colours: Sequence[int]) -> Made:
    """Join the two cells of a colour by a line with one corner."""
    across, drawn = bool(rng.integers(2)), int(rng.integers(1, 10)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for colour in sorted(_colours_of(grid)):
            ends = np.argwhere(grid == colour).tolist()
            if len(ends) != 2:
                continue
            (top, first), (bottom, second) = ends
            bend, (left, right) = (second, top) if across else (first, bottom), sorted((first, second))
            for part in (changed[top : bottom + 1, bend[0]], changed[bend[1], left : right + 1]):
                part[part == BLACK] = colour if drawn is None else drawn
        return changed

    return {"across": across, "colour": drawn}, solve


@operation("marks", "objects", "noise", "alike_objects", "model")
def between(rng: Random, colours: Sequence[int]) -> Made:
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
def enlarge_by_count(rng: Random, colours: Sequence[int]) -> Made:
    """Make cells blocks with a side as long as there are colours; or put so many copies beside each other."""
    blocks = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        count = len(_colours_of(grid))
        if count * max(grid.shape) > 30:
            raise Unfit("too large")
        return np.kron(grid, np.ones((count, count), dtype=int)) if blocks else np.tile(grid, (count, count))

    return {"blocks": blocks}, solve


@operation("noise", "objects", "marks")
def frame_by_count(rng: Random, colours: Sequence[int]) -> Made:
    """Put a frame around the grid in the colour that is the most or the least common in it."""
    most = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        found = sorted(_colours_of(grid))
        counts = [np.count_nonzero(grid == colour) * (1 if most else -1) for colour in found]
        if len(found) < 2:
            raise Unfit("one colour")
        return np.pad(grid, 1, constant_values=found[_single(counts)])

    return {"most": most}, solve
