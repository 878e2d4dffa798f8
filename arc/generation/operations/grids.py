"""Operations on whole grids: turn, tile, cut, shift, sort and complete them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import box_of
from arc.generation.rules import BLACK, Grid, Operation, Operations, Random, Unfit, pick, registering
from arc.generation.scenes import SCENES
from arc.puzzles.keys import dihedral

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


@operation(*SCENES)
def turn(rng: Random, colours: Sequence[int]) -> Operation:
    """Turn or mirror the grid."""
    number = int(rng.integers(1, 8))
    return {"symmetry": number}, lambda grid: dihedral(grid, number)


@operation("noise", "marks", "objects", "bars", "alike_objects")
def tile(rng: Random, colours: Sequence[int]) -> Operation:
    """Put copies of the grid beside each other, each turned in its own way."""
    high, wide = pick(rng, [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3)])
    plain = rng.random() < 0.3
    # Of grids that are not square only mirror images fit.
    numbers = np.zeros((high, wide), dtype=int) if plain else 2 * rng.integers(0, 4, size=(high, wide))

    def solve(grid: Grid) -> Grid:
        return np.vstack([np.hstack([dihedral(grid, int(number)) for number in row]) for row in numbers])

    return {"symmetries": numbers.tolist()}, solve


@operation("noise", "marks")
def tile_by_cells(rng: Random, colours: Sequence[int]) -> Operation:
    """Put a copy of the grid where it has a coloured cell (or a black one), and nothing elsewhere."""
    black = bool(rng.random() < 0.3)

    def solve(grid: Grid) -> Grid:
        where = np.kron((grid == BLACK) == black, np.ones(grid.shape, dtype=int))
        return where * np.tile(grid, grid.shape)

    return {"black": black}, solve


@operation("noise", "marks", "objects", "alike_objects")
def enlarge(rng: Random, colours: Sequence[int]) -> Operation:
    """Make every cell a block."""
    high, wide = pick(rng, [(2, 2), (3, 3), (1, 2), (2, 1)])
    block = np.ones((high, wide), dtype=int)
    return {"rows": high, "columns": wide}, lambda grid: np.kron(grid, block)


@operation("noise", "symmetric", "periodic", "objects")
def take_part(rng: Random, colours: Sequence[int]) -> Operation:
    """Take a half, a quarter, every second line, or what is inside the edge."""
    kind = pick(rng, ["left", "right", "top", "bottom", "corner", "second", "inner"])
    pieces = {
        "left": lambda grid: grid[:, : -(-grid.shape[1] // 2)],
        "right": lambda grid: grid[:, grid.shape[1] // 2 :],
        "top": lambda grid: grid[: -(-grid.shape[0] // 2)],
        "bottom": lambda grid: grid[grid.shape[0] // 2 :],
        "corner": lambda grid: grid[: -(-grid.shape[0] // 2), : -(-grid.shape[1] // 2)],
        "second": lambda grid: grid[::2, ::2],
        "inner": lambda grid: grid[1:-1, 1:-1],
    }

    def solve(grid: Grid) -> Grid:
        piece = pieces[kind](grid)
        if not piece.size:
            raise Unfit("nothing is left")
        return piece

    return {"part": kind}, solve


@operation("objects", "marks", "dirty_objects", "lines", "alike_objects", "model", "stacked")
def squeeze(rng: Random, colours: Sequence[int]) -> Operation:
    """Take away what is black around everything, all black rows and columns, or lines like the one before."""
    kind = pick(rng, ["around", "black", "repeated"])

    def solve(grid: Grid) -> Grid:
        if not grid.any():
            raise Unfit("nothing is left")
        if kind == "repeated":
            for _ in range(2):
                keep = np.r_[True, (grid[1:] != grid[:-1]).any(axis=1)]
                grid = grid[keep].T
            return grid
        if kind == "around":
            return grid[box_of(grid != BLACK)]
        return grid[grid.any(axis=1)][:, grid.any(axis=0)]

    return {"what": kind}, solve


@operation("noise", "marks", "objects", "bars")
def surround(rng: Random, colours: Sequence[int]) -> Operation:
    """Put a frame around the grid, or over its edge."""
    colour, around = int(rng.integers(1, 10)), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        if around:
            return np.pad(grid, 1, constant_values=colour)
        if min(grid.shape) < 3:
            raise Unfit("nothing is left")
        changed = np.full_like(grid, colour)
        changed[1:-1, 1:-1] = grid[1:-1, 1:-1]
        return changed

    return {"colour": colour, "around": around}, solve


@operation("noise", "marks", "objects", "lines", "model")
def shift(rng: Random, colours: Sequence[int]) -> Operation:
    """Move everything, what leaves comes back on the other side; or each row further than the one above it."""
    down, right, slanted = int(rng.integers(-2, 3)), int(rng.integers(-2, 3)), bool(rng.random() < 0.3)
    if slanted:
        down, right = 0, right or 1

    def solve(grid: Grid) -> Grid:
        if slanted:
            return np.stack([np.roll(line, row * right) for row, line in enumerate(grid)])
        return np.roll(grid, (down, right), axis=(0, 1))

    return {"down": down, "right": right, "slanted": slanted}, solve


@operation("noise", "bars", "lines", "marks")
def sort_lines(rng: Random, colours: Sequence[int]) -> Operation:
    """Put rows or columns in the order of how many coloured cells they have."""
    axis, upwards = int(rng.integers(2)), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        turned = grid.T if axis else grid
        counts = np.count_nonzero(turned, axis=1)
        turned = turned[np.argsort(counts if upwards else -counts, kind="stable")]
        return turned.T if axis else turned

    return {"axis": axis, "upwards": upwards}, solve


@operation("noise", "marks", "symmetric", "bars", "objects")
def fold(rng: Random, colours: Sequence[int]) -> Operation:
    """Fold the grid in the middle: the halves lie on each other, or cells get a colour by how many of them have one."""
    axis, turned = int(rng.integers(2)), bool(rng.random() < 0.7)
    kind, colour = pick(rng, ["over", "both", "one", "none"]), int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        lines = grid.T if axis else grid
        half = len(lines) // 2
        if not half or len(lines) % 2:
            raise Unfit("no halves")
        first, second = lines[:half], lines[half:][::-1] if turned else lines[half:]
        count = (first != BLACK).astype(int) + (second != BLACK)
        if kind == "over":
            changed = np.where(first != BLACK, first, second)
        else:
            changed = np.where(count == {"both": 2, "one": 1, "none": 0}[kind], colour, BLACK)
        return changed.T if axis else changed

    return {"axis": axis, "turned": turned, "kind": kind, "colour": None if kind == "over" else colour}, solve


@operation("noise", "bars", "objects", "periodic")
def level_lines(rng: Random, colours: Sequence[int]) -> Operation:
    """Give each row or column the colour that most of its coloured cells have, or answer with one cell for each."""
    axis, short = int(rng.integers(2)), bool(rng.random() < 0.4)

    def solve(grid: Grid) -> Grid:
        lines = grid.T if axis else grid
        counts = np.stack([np.bincount(line, minlength=10) for line in lines])
        counts[:, BLACK] = 0
        best = np.sort(counts, axis=1)
        if ((best[:, -1] == best[:, -2]) & (best[:, -1] > 0)).any():
            raise Unfit("no single colour")
        changed = np.repeat(counts.argmax(axis=1)[:, None], 1 if short else lines.shape[1], axis=1)
        return changed.T if axis else changed

    return {"axis": axis, "short": short}, solve


@operation("symmetric", "objects", "marks", "dirty_objects", "divided")
def complete(rng: Random, colours: Sequence[int]) -> Operation:
    """Fill black cells with what their mirror images show."""
    numbers = pick(rng, [(4,), (2,), (2, 4, 6), (6,)])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for number in numbers:
            mirrored = dihedral(grid, number)
            changed = np.where(changed == BLACK, mirrored, changed)
        return changed

    return {"symmetries": numbers}, solve


@operation("symmetric")
def show_covered(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with what the black box of a symmetric pattern covers."""

    def solve(grid: Grid) -> Grid:
        rows, columns = np.nonzero(grid == BLACK)
        if not len(rows):
            raise Unfit("no box")
        filled = grid
        for number in (4, 2, 6, 1):
            if number != 1 or grid.shape[0] == grid.shape[1]:
                filled = np.where(filled == BLACK, dihedral(filled, number), filled)
        piece = filled[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if (piece == BLACK).any():
            raise Unfit("not shown elsewhere")
        return piece

    return {}, solve


@operation("periodic")
def continue_pattern(rng: Random, colours: Sequence[int]) -> Operation:
    """Fill the black cells of a pattern that repeats itself, by its smallest period."""

    def solve(grid: Grid) -> Grid:
        rows, columns = np.ogrid[: grid.shape[0], : grid.shape[1]]
        known = grid != BLACK
        for area in range(1, 10):
            for high in range(1, 4):
                wide, rest = divmod(area, high)
                if rest or wide > 3:
                    continue
                place = (rows % high) * wide + columns % wide
                best = np.zeros(high * wide, dtype=int)
                best[place[known]] = grid[known]
                if (best[place][known] == grid[known]).all() and best.all():
                    return best[place]
        raise Unfit("no period")

    return {}, solve
