"""Scenes: what the inputs of a program look like, such as objects, single cells, or panels beside lines.

To add a scene: write a function that draws its parameters and returns a `Scene`, register it with @scene, and name it
at the operations that suit it. Put it at the end: a seed draws positions in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.generation.objects import box_of
from arc.generation.rules import BLACK, SIDES, Draw, Grid, Random, pick


class Scene(NamedTuple):
    """What the inputs of a rule look like.

    Args:
        parameters: what was drawn for the rule.
        colours: the colours that occur, without the background.
        draw: draws an input.
    """

    parameters: dict[str, Any]
    colours: list[int]
    draw: Draw


SCENES: dict[str, Callable[[Random, int], Scene]] = {}
OBJECT_SCENES = ("objects", "dirty_objects", "alike_objects")  # scenes whose cells form objects


def scene(function: Callable[[Random, int], Scene]) -> Callable[[Random, int], Scene]:
    """Register a kind of scene under its function's name."""
    SCENES[function.__name__] = function
    return function


def _palette(rng: Random, most: int) -> list[int]:
    return (rng.permutation(9)[: rng.integers(1, most + 1)] + 1).tolist()


def _sides(rng: Random, least: int, max_side: int) -> Callable[[Random], tuple[int, int]]:
    # Sides of a rule's inputs: the same in all, or another in each; square, or not.
    if rng.random() < 0.3:  # room for what makes grids larger
        max_side = max(least, max_side // 2)
    low = int(rng.integers(least, max_side + 1))
    high = low if rng.random() < 0.4 else int(rng.integers(low, max_side + 1))
    square = rng.random() < 0.4

    def draw(r: Random) -> tuple[int, int]:
        rows, columns = (int(side) for side in r.integers(low, high + 1, size=2))
        return rows, rows if square else columns

    return draw


def _scattered(rng: Random, shape: tuple[int, int], colours: Sequence[int], share: float) -> Grid:
    grid = np.asarray(colours)[rng.integers(len(colours), size=shape)]
    return np.where(rng.random(shape) < share, grid, BLACK)


@scene
def noise(rng: Random, max_side: int) -> Scene:
    """Every cell of any colour of a palette, the background's among them or not."""
    colours, sides = _palette(rng, 6), _sides(rng, 2, max_side)
    share = 1.0 if len(colours) > 1 and rng.random() < 0.5 else float(rng.uniform(0.3, 0.9))
    return Scene({"colours": colours}, colours, lambda r: _scattered(r, sides(r), colours, share))


@scene
def marks(rng: Random, max_side: int) -> Scene:
    """A few single cells on the background."""
    colours, sides, most = _palette(rng, 4), _sides(rng, 3, max_side), int(rng.integers(1, 7))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        cells = r.permutation(grid.size)[: r.integers(1, most + 1)]
        grid.flat[cells] = np.asarray(colours)[r.integers(len(colours), size=len(cells))]
        return grid

    return Scene({"colours": colours, "most": most}, colours, draw)


def _shape(rng: Random, kind: str, most: int) -> Grid:
    # A mask of an object: True where it has a cell.
    rows, columns = (int(side) for side in rng.integers(1, most + 1, size=2))
    if kind == "line":
        return np.ones((1, max(2, columns)) if rng.random() < 0.5 else (max(2, rows), 1), dtype=bool)
    if kind == "box":
        return np.ones((max(2, rows), max(2, columns)), dtype=bool)
    if kind == "frame":
        mask = np.ones((max(3, rows), max(3, columns)), dtype=bool)
        mask[1:-1, 1:-1] = False
        return mask
    if kind == "cross":
        mask = np.zeros((3, 3), dtype=bool)
        mask[1] = mask[:, 1] = True
        return mask
    mask = np.zeros((max(2, rows), max(2, columns)), dtype=bool)  # any: a walk
    row, column = (int(rng.integers(side)) for side in mask.shape)
    for way in rng.integers(4, size=rng.integers(2, 2 * mask.size)).tolist():
        mask[row, column] = True
        down, right = SIDES[way]
        row, column = min(max(row + down, 0), mask.shape[0] - 1), min(max(column + right, 0), mask.shape[1] - 1)
    lines = mask[mask.any(axis=1)]
    return lines[:, lines.any(axis=0)]


def _place(rng: Random, grid: Grid, mask: Grid, colour: Any) -> Grid | None:
    # Put an object where nothing is near: the region of the grid that it is in, or None without room in a few tries.
    rows, columns = mask.shape
    if rows > grid.shape[0] or columns > grid.shape[1]:
        return None
    for _ in range(8):
        top, left = int(rng.integers(grid.shape[0] - rows + 1)), int(rng.integers(grid.shape[1] - columns + 1))
        if not grid[max(0, top - 1) : top + rows + 1, max(0, left - 1) : left + columns + 1].any():
            region = grid[top : top + rows, left : left + columns]
            region[mask] = colour
            return region
    return None


def _objects(rng: Random, max_side: int, noisy: bool) -> Scene:
    colours, sides = _palette(rng, 4), _sides(rng, min(5, max_side), max_side)
    kinds = ["any", "box", "frame", "line", "cross"]
    kinds = [kinds[i] for i in rng.permutation(5)[: rng.integers(1, 4)]]
    most, largest = int(rng.integers(1, 6)), int(rng.integers(2, max(3, max_side // 2) + 1))
    mixed = rng.random() < 0.2  # objects of several colours
    dirt = int(pick(rng, [*colours, *(set(range(1, 10)) - set(colours))]))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        for _ in range(int(r.integers(1, most + 1))):
            mask = _shape(r, pick(r, kinds), largest)
            colour = r.choice(colours, size=int(mask.sum())) if mixed else pick(r, colours)
            _place(r, grid, mask, colour)
        if noisy:
            for cell in r.permutation(grid.size)[: r.integers(1, 5)]:
                if not grid.flat[cell]:
                    grid.flat[cell] = dirt
        return grid

    parameters = {"colours": colours, "shapes": kinds, "most": most, "largest": largest, "mixed": mixed}
    if noisy:
        parameters["dirt"] = dirt
    return Scene(parameters, list(dict.fromkeys([*colours, dirt])) if noisy else colours, draw)


@scene
def objects(rng: Random, max_side: int) -> Scene:
    """Objects that do not touch each other."""
    return _objects(rng, max_side, noisy=False)


@scene
def dirty_objects(rng: Random, max_side: int) -> Scene:
    """Objects, and single cells that may touch them."""
    return _objects(rng, max_side, noisy=True)


@scene
def alike_objects(rng: Random, max_side: int) -> Scene:
    """Objects of one shape or two that occur several times."""
    colours, sides = _palette(rng, 3), _sides(rng, min(6, max_side), max_side)
    largest, kind = int(rng.integers(2, 4)), pick(rng, ["any", "any", "box"])
    fixed = [_shape(rng, kind, largest) for _ in range(2)] if rng.random() < 0.4 else None

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        shapes = fixed or [_shape(r, kind, largest) for _ in range(2)]
        for number in range(int(r.integers(3, 6))):
            _place(r, grid, shapes[number == 0], pick(r, colours))
        return grid

    return Scene({"colours": colours, "largest": largest, "shape": kind, "fixed": fixed is not None}, colours, draw)


@scene
def lines(rng: Random, max_side: int) -> Scene:
    """Whole rows and columns, and single cells."""
    colours, sides = _palette(rng, 4), _sides(rng, min(4, max_side), max_side)
    most, cells, across = int(rng.integers(1, 4)), int(rng.integers(0, 4)), bool(rng.integers(2))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        for cell in r.permutation(grid.size)[: r.integers(0, cells + 1)]:
            grid.flat[cell] = pick(r, colours)
        for _ in range(int(r.integers(1, most + 1))):
            turned = grid.T if across and r.random() < 0.5 else grid
            turned[r.integers(len(turned))] = pick(r, colours)
        return grid

    return Scene({"colours": colours, "most": most, "cells": cells, "across": across}, colours, draw)


@scene
def panels(rng: Random, max_side: int) -> Scene:
    """Equal panels side by side, a line of one colour between each two."""
    count = int(rng.integers(2, min(4, (max_side + 1) // 2) + 1))
    widest = (max_side - count + 1) // count
    colours = _palette(rng, 3)
    line = int(pick(rng, sorted(set(range(1, 10)) - set(colours))))
    own = len(colours) > 1 and rng.random() < 0.5  # each panel in one colour, the same in all puzzles
    share = float(rng.uniform(0.25, 0.7))
    width = int(rng.integers(1, widest + 1))
    same = rng.random() < 0.5

    def draw(r: Random) -> Grid:
        columns = width if same else int(r.integers(1, widest + 1))
        shape = int(r.integers(2, max_side + 1)), columns
        pieces: list[Grid] = []
        for number in range(count):
            pieces.append(_scattered(r, shape, [colours[number % len(colours)]] if own else colours, share))
            pieces.append(np.full((shape[0], 1), line))
        return np.hstack(pieces[:-1])

    return Scene({"panels": count, "colours": colours, "line": line, "own": own}, [*colours, line], draw)


@scene
def symmetric(rng: Random, max_side: int) -> Scene:
    """A pattern that is its own mirror image, with a box over a part of it."""
    colours, cover = _palette(rng, 6), 0
    diagonal = bool(rng.integers(2))
    least = int(rng.integers(3, max_side + 1))

    def draw(r: Random) -> Grid:
        side = int(r.integers(least, max_side + 1))
        half = -(-side // 2)
        region = np.asarray(colours)[r.integers(len(colours), size=(half, half))]
        if diagonal:
            region = np.where(np.tri(half, dtype=bool), region, region.T)
        mirrored = np.minimum(np.arange(side), np.arange(side)[::-1])  # of an odd number the middle one once
        grid = region[np.ix_(mirrored, mirrored)]
        high, wide = (int(n) for n in r.integers(1, max(2, half), size=2))
        top, left = (int(r.integers(n - m + 1)) for n, m in zip(grid.shape, (high, wide), strict=True))
        grid[top : top + high, left : left + wide] = cover
        return grid

    return Scene({"colours": colours, "diagonal": diagonal}, colours, draw)


@scene
def periodic(rng: Random, max_side: int) -> Scene:
    """A pattern that repeats itself, with a box over a part of it or only its beginning."""
    colours = _palette(rng, 6)
    sides = _sides(rng, min(5, max_side), max_side)
    begun = rng.random() < 0.5

    def draw(r: Random) -> Grid:
        rows, columns = sides(r)
        high, wide = (int(n) for n in r.integers(1, 4, size=2))
        region = np.asarray(colours)[r.integers(len(colours), size=(high, wide))]
        grid = np.tile(region, (rows // high + 1, columns // wide + 1))[:rows, :columns]
        if begun:
            grid[:, min(columns - 1, 2 * wide) :] = BLACK
        else:
            high, wide = (int(n) for n in r.integers(1, 3, size=2))
            top, left = (int(r.integers(n - m + 1)) for n, m in zip(grid.shape, (high, wide), strict=True))
            grid[top : top + high, left : left + wide] = BLACK
        return grid

    return Scene({"colours": colours, "begun": bool(begun)}, colours, draw)


@scene
def bars(rng: Random, max_side: int) -> Scene:
    """Columns of different heights on the lowest row."""
    colours, sides = _palette(rng, 4), _sides(rng, min(4, max_side), max_side)
    gap = int(rng.integers(1, 3))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        for column in range(int(r.integers(gap)), grid.shape[1], gap):
            height = int(r.integers(0, len(grid) + 1))
            grid[len(grid) - height :, column] = pick(r, colours)
        return grid

    return Scene({"colours": colours, "gap": gap}, colours, draw)


@scene
def divided(rng: Random, max_side: int) -> Scene:
    """A line across the grid, and objects or single cells on one side of it or both."""
    colours, sides = _palette(rng, 3), _sides(rng, min(5, max_side), max_side)
    line = int(pick(rng, sorted(set(range(1, 10)) - set(colours))))
    upright, middle, both = (bool(rng.random() < share) for share in (0.5, 0.5, 0.6))
    kind, most = pick(rng, ["any", "box", "cell"]), int(rng.integers(1, 5))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        turned = grid.T if upright else grid
        at = len(turned) // 2 if middle else int(r.integers(1, len(turned) - 1))
        halves = [turned[:at], turned[at + 1 :]]
        for _ in range(int(r.integers(1, most + 1))):
            mask = np.ones((1, 1), dtype=bool) if kind == "cell" else _shape(r, kind, 2)
            _place(r, halves[r.integers(2) if both else 0], mask, pick(r, colours))
        turned[at] = line
        return grid

    parameters = {"colours": colours, "line": line, "upright": upright, "middle": middle, "both": both, "shape": kind}
    return Scene(parameters, [*colours, line], draw)


@scene
def boxed(rng: Random, max_side: int) -> Scene:
    """Frames with cells of other colours in some of them, and some outside."""
    colours, sides = (rng.permutation(9)[: rng.integers(2, 5)] + 1).tolist(), _sides(rng, min(6, max_side), max_side)
    frame = colours[0] if rng.random() < 0.6 else None  # or each of another colour
    most, cells, outside = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(0, 4))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        for _ in range(int(r.integers(1, most + 1))):
            colour = frame or pick(r, colours)
            region = _place(r, grid, _shape(r, "frame", max(3, max_side // 2)), colour)
            if region is not None:
                inner, other = region[1:-1, 1:-1], pick(r, [c for c in colours if c != colour])
                for cell in r.permutation(inner.size)[: r.integers(0, cells + 1)]:
                    inner[np.unravel_index(cell, inner.shape)] = other
        for _ in range(int(r.integers(0, outside + 1))):
            _place(r, grid, np.ones((1, 1), dtype=bool), pick(r, colours[1:]))
        return grid

    parameters = {"colours": colours, "frame": frame, "most": most, "cells": cells, "outside": outside}
    return Scene(parameters, colours, draw)


@scene
def stacked(rng: Random, max_side: int) -> Scene:
    """Boxes of different colours, each over a part of the one before, or each inside the one before."""
    colours = (rng.permutation(9)[: rng.integers(2, 5)] + 1).tolist()
    sides, nested = _sides(rng, min(6, max_side), max_side), bool(rng.random() < 0.4)
    count = int(rng.integers(2, min(3, len(colours)) + 1))

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        order = [colours[i] for i in r.permutation(len(colours))]
        if nested:
            high, wide = (int(r.integers(min(side, 3), side + 1)) for side in grid.shape)
            region = _place(r, grid, np.ones((high, wide), dtype=bool), order[0])
            assert region is not None, "an empty grid has room"
            for colour in order[1:]:
                region = region[1:-1, 1:-1]
                region[:] = colour
            return grid
        below: list[int] = []
        for colour in order[:count]:
            for _ in range(8):
                changed = grid.copy()
                high, wide = (int(r.integers(2, max(3, side // 2 + 2))) for side in grid.shape)
                top, left = (int(r.integers(max(1, n - m + 1))) for n, m in zip(grid.shape, (high, wide), strict=True))
                changed[top : top + high, left : left + wide] = colour
                # It hides something of the last one, and of none how far it reaches.
                hides = not below or ((changed != grid) & (grid == below[-1])).any()
                if hides and all(c in changed and box_of(changed == c) == box_of(grid == c) for c in below):
                    grid = changed
                    below.append(colour)
                    break
        return grid

    return Scene({"colours": colours, "nested": nested, "most": count}, colours, draw)


@scene
def table(rng: Random, max_side: int) -> Scene:
    """Equal panels in rows and columns, lines of one colour between them."""
    down, right = (int(rng.integers(2, min(3, (max_side + 1) // 2) + 1)) for _ in range(2))
    colours = _palette(rng, 3)
    line = int(pick(rng, sorted(set(range(1, 10)) - set(colours))))
    # Panels of any cells, of one colour each, all empty but one, or alike but one.
    kind = pick(rng, ["any", "own", "one", "alike"])
    share = float(rng.uniform(0.3, 0.8))
    high, wide = (int(rng.integers(1, (max_side - count + 1) // count + 1)) for count in (down, right))

    def draw(r: Random) -> Grid:
        grid = np.full((down * (high + 1) - 1, right * (wide + 1) - 1), line)
        model, special = _scattered(r, (high, wide), colours, share), int(r.integers(down * right))
        for number in range(down * right):
            top, left = number // right * (high + 1), number % right * (wide + 1)
            region = _scattered(r, (high, wide), [pick(r, colours)] if kind == "own" else colours, share)
            if kind in ("one", "alike") and number != special:
                region = model if kind == "alike" else np.zeros_like(region)
            grid[top : top + high, left : left + wide] = region
        return grid

    parameters = {"rows": down, "columns": right, "colours": colours, "line": line, "kind": kind}
    return Scene(parameters, [*colours, line], draw)


@scene
def model(rng: Random, max_side: int) -> Scene:
    """One object, and single cells of another colour."""
    colours, sides = _palette(rng, 3), _sides(rng, min(5, max_side), max_side)
    mark = int(pick(rng, sorted(set(range(1, 10)) - set(colours))))
    several, most = bool(rng.random() < 0.4), int(rng.integers(1, 4))
    fixed = _shape(rng, "any", 3) if rng.random() < 0.3 else None

    def draw(r: Random) -> Grid:
        grid = np.zeros(sides(r), dtype=int)
        mask = _shape(r, "any", 3) if fixed is None else fixed
        _place(r, grid, mask, r.choice(colours, size=int(mask.sum())) if several else pick(r, colours))
        for _ in range(int(r.integers(1, most + 1))):
            _place(r, grid, np.ones((1, 1), dtype=bool), mark)
        return grid

    parameters = {"colours": colours, "mark": mark, "several": several, "fixed": fixed is not None}
    return Scene(parameters, [*colours, mark], draw)
