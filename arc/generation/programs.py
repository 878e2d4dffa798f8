"""Rules put together at random: a kind of scene, and one to three operations on it. For arc/generation/pretraining.py.

The families of make_dataset.py have a handful of rules each. Here a rule is a small program: what its inputs look like
(objects, marks, panels beside lines, patterns with a hole), and operations that follow each other, each with
parameters of its own (which objects, which colours, which directions): 15 scenes and 77 operations. They are about what
ARC's puzzles are said to be about, objects, counting, symmetry, lines, inside and outside (Chollet 2019,
https://arxiv.org/abs/1911.01547, "core knowledge"), and what was lacking in them of the 16 groups of concepts that
ConceptARC lists (Moskvichev, Odouard and Mitchell 2023, https://arxiv.org/abs/2305.07141) stands in
concepts.py; none is made after a task. Each operation of a program matters: it changes the grid, and without
it the output would be another.

To add an operation: write a function that draws its parameters and returns them with what it does to a grid, and
register it with @operation and the scenes that it suits (`outline` is a short one). To add a scene: @scene.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.generation.families import Grid, Random, Rule, pick
from arc.puzzles.keys import dihedral

Solve = Callable[[Grid], Grid]
Draw = Callable[[Random], Grid]
Made = tuple[dict[str, Any], Solve]  # an operation's parameters, and what it does
State = tuple[Grid, list[Grid]]  # what a program makes of an input, and what programs that lack something make of it

BLACK = 0  # the background; views give it other colours
TRIES = 20  # inputs that are drawn for one that all operations have something to do on
DRAWN, CHECKED = 6, 4  # inputs that are drawn for a program, and on how many of them it has to prove itself
LATER_TRIED = 8  # operations that are tried at each place but the first
PARAMETERS_TRIED = 2  # of each operation
SCENES_TRIED = 10  # scenes that an operation gets until another one is drawn
PROGRAMS = 400  # scenes drawn until a program proves itself
LENGTHS = (1, 1, 2, 2, 3)  # operations of a program
SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


class Unfit(ValueError):
    """An operation has nothing to do on a grid, or no single thing."""


class Scene(NamedTuple):
    """What the inputs of a rule look like.

    Args:
        parameters: what was drawn for the rule.
        colours: that occur in it, without the background's.
        draw: makes an input.
    """

    parameters: dict[str, Any]
    colours: list[int]
    draw: Draw


SCENES: dict[str, Callable[[Random, int], Scene]] = {}
OPERATIONS: dict[str, tuple[Callable[[Random, Sequence[int]], Made], tuple[str, ...]]] = {}


def scene(function: Callable[[Random, int], Scene]) -> Callable[[Random, int], Scene]:
    """Register a kind of scene under its function's name."""
    SCENES[function.__name__] = function
    return function


def operation(*scenes: str) -> Callable[[Callable], Callable]:
    """Register an operation under its function's name.

    Args:
        scenes: that it suits as the first of a program, and after others rather than other scenes; none: all.
    """

    def register(function: Callable[[Random, Sequence[int]], Made]) -> Callable:
        OPERATIONS[function.__name__] = function, scenes or tuple(SCENES)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def program(rng: Random, max_side: int) -> Rule:
    """Draw a rule: a scene and operations.

    How many there are, and one of them with its place, is drawn first, so that hard ones are not rarer; the others are
    tried until they fit what is there.

    Args:
        rng: of all draws.
        max_side: largest side of any grid, from 3.

    Returns:
        The rule. On inputs that it draws each operation changes the grid, no program that lacks some of its operations
        gives the same output, no side is above `max_side`, and not all outputs are alike.

    Raises:
        RuntimeError: no program was found, which does not happen by chance.
    """
    length, names = pick(rng, LENGTHS), list(OPERATIONS)
    for number in range(PROGRAMS):
        if number % SCENES_TRIED == 0:
            aim, place = pick(rng, names), int(rng.integers(length))
        kind = pick(rng, OPERATIONS[aim][1])
        suiting = [name for name in names if kind in OPERATIONS[name][1] and len(OPERATIONS[name][1]) < len(SCENES)]
        made = SCENES[kind](rng, max_side)
        states: list[State] = [(made.draw(rng), []) for _ in range(DRAWN)]
        chosen: list[tuple[str, Made]] = []
        for at in range(length):
            # An operation that comes twice often does no more than it does once, with other parameters.
            left = {*names} - {aim, *(name for name, _ in chosen)}
            others = [[name for name in each if name in left] for each in (suiting, names)]
            among = [[aim]] if at == place else [each for each in others if each]
            found = _next(rng, made, states, among if at else among[:1], max_side)
            if found is None:
                break
            states = found[2]
            chosen.append(found[:2])
        if len(chosen) < length:
            continue
        named = [{"operation": name, **parameters} for name, (parameters, _) in chosen]
        rule = _rule(made, [solve for _, (_, solve) in chosen], max_side)
        return rule._replace(parameters={"scene": kind, **made.parameters, "operations": named})
    raise RuntimeError(f"none of {PROGRAMS} programs does anything on grids of sides up to {max_side}")


def _next(
    rng: Random, made: Scene, states: list[State], among: Sequence[Sequence[str]], max_side: int
) -> tuple[str, Made, list[State]] | None:
    # An operation that fits at least CHECKED of the grids: its name, what was made, and what it makes of them.
    first = not states[0][1]
    present = np.unique(np.concatenate([grid.ravel() for grid, _ in states])).tolist()
    colours = made.colours if first else [colour for colour in present if colour != BLACK] or made.colours
    for _ in range(1 if first else LATER_TRIED):
        name = pick(rng, pick(rng, among))
        for _ in range(PARAMETERS_TRIED):
            tried = OPERATIONS[name][0](rng, colours)
            reached: list[State] = []
            for left, state in zip(range(len(states), 0, -1), states, strict=True):
                if len(reached) + left < CHECKED:
                    break
                with contextlib.suppress(Unfit):
                    reached.append(_advance(state, tried[1], max_side))
            if len(reached) < CHECKED:
                continue
            # One operation may have few answers (a single cell), a later one must not make nearly all outputs alike.
            different = len({(grid.shape, grid.tobytes()) for grid, _ in reached})
            if different >= max(2, 0 if first else len(reached) / 2):
                return name, tried, reached
    return None


def _changed(grid: Grid, step: Solve, max_side: int) -> Grid:
    changed = step(grid)
    if not 1 <= min(changed.shape) <= max(changed.shape) <= max_side:
        raise Unfit("too large, or nothing")
    return changed


def _advance(state: State, step: Solve, max_side: int) -> State:
    # One operation further. What programs give that lack one operation or several comes along, the input among it.
    grid, shorter = state
    changed = _changed(grid, step, max_side)
    if np.array_equal(changed, grid):
        raise Unfit("nothing changes")
    shorter = [*shorter, grid]
    for other in state[1]:
        with contextlib.suppress(Unfit):
            shorter.append(_changed(other, step, max_side))
    if any(np.array_equal(changed, other) for other in shorter):
        raise Unfit("some operation does not matter")
    return changed, shorter


def _rule(made: Scene, steps: Sequence[Solve], max_side: int) -> Rule:
    last: list[Grid] = []  # the last input that was drawn, and its output

    def solve(grid: Grid) -> Grid:
        if last and last[0] is grid:
            return last[1]
        state: State = (grid, [])
        for step in steps:
            state = _advance(state, step, max_side)
        return state[0]

    def draw(rng: Random) -> Grid:
        for _ in range(TRIES):
            grid = made.draw(rng)
            try:
                last[:] = grid, solve(grid)
            except Unfit:
                continue
            return grid
        raise Unfit(f"{TRIES} inputs on which not all operations have something to do")

    return Rule({}, draw, solve)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


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
    # Put an object where nothing is near: the part of the grid that it is in, or None without room in a few tries.
    rows, columns = mask.shape
    if rows > grid.shape[0] or columns > grid.shape[1]:
        return None
    for _ in range(8):
        top, left = int(rng.integers(grid.shape[0] - rows + 1)), int(rng.integers(grid.shape[1] - columns + 1))
        if not grid[max(0, top - 1) : top + rows + 1, max(0, left - 1) : left + columns + 1].any():
            part = grid[top : top + rows, left : left + columns]
            part[mask] = colour
            return part
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

    found = {"colours": colours, "shapes": kinds, "most": most, "largest": largest, "mixed": mixed}
    if noisy:
        found["dirt"] = dirt
    return Scene(found, list(dict.fromkeys([*colours, dirt])) if noisy else colours, draw)


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
    """Equal parts side by side, a line of one colour between each two."""
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
        parts: list[Grid] = []
        for number in range(count):
            parts.append(_scattered(r, shape, [colours[number % len(colours)]] if own else colours, share))
            parts.append(np.full((shape[0], 1), line))
        return np.hstack(parts[:-1])

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
        part = np.asarray(colours)[r.integers(len(colours), size=(half, half))]
        if diagonal:
            part = np.where(np.tri(half, dtype=bool), part, part.T)
        mirrored = np.minimum(np.arange(side), np.arange(side)[::-1])  # of an odd number the middle one once
        grid = part[np.ix_(mirrored, mirrored)]
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
        part = np.asarray(colours)[r.integers(len(colours), size=(high, wide))]
        grid = np.tile(part, (rows // high + 1, columns // wide + 1))[:rows, :columns]
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

    found = {"colours": colours, "line": line, "upright": upright, "middle": middle, "both": both, "shape": kind}
    return Scene(found, [*colours, line], draw)


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
            part = _place(r, grid, _shape(r, "frame", max(3, max_side // 2)), colour)
            if part is not None:
                inner, other = part[1:-1, 1:-1], pick(r, [c for c in colours if c != colour])
                for cell in r.permutation(inner.size)[: r.integers(0, cells + 1)]:
                    inner[np.unravel_index(cell, inner.shape)] = other
        for _ in range(int(r.integers(0, outside + 1))):
            _place(r, grid, np.ones((1, 1), dtype=bool), pick(r, colours[1:]))
        return grid

    found = {"colours": colours, "frame": frame, "most": most, "cells": cells, "outside": outside}
    return Scene(found, colours, draw)


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
            part = _place(r, grid, np.ones((high, wide), dtype=bool), order[0])
            for colour in order[1:]:
                part = part[1:-1, 1:-1]
                part[:] = colour
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
            part = _scattered(r, (high, wide), [pick(r, colours)] if kind == "own" else colours, share)
            if kind in ("one", "alike") and number != special:
                part = model if kind == "alike" else np.zeros_like(part)
            grid[top : top + high, left : left + wide] = part
        return grid

    found = {"rows": down, "columns": right, "colours": colours, "line": line, "kind": kind}
    return Scene(found, [*colours, line], draw)


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

    found = {"colours": colours, "mark": mark, "several": several, "fixed": fixed is not None}
    return Scene(found, [*colours, mark], draw)


# ---------------------------------------------------------------------------------------------------------------------
# Objects of a grid


class Part(NamedTuple):
    """An object: cells that touch each other.

    Args:
        rows: of its cells, int (cells,).
        columns: likewise.
        box: the smallest slices that hold it.
        colour: of its first cell.
    """

    rows: np.ndarray
    columns: np.ndarray
    box: tuple[slice, slice]
    colour: int

    @property
    def size(self) -> int:
        """Cells."""
        return len(self.rows)

    def mask(self) -> Grid:
        """True where it has a cell, in its box."""
        mask = np.zeros([part.stop - part.start for part in self.box], dtype=bool)
        mask[self.rows - self.box[0].start, self.columns - self.box[1].start] = True
        return mask


def parts_of(grid: Grid, by_colour: bool, corners: bool) -> list[Part]:
    """The objects of a grid, from the top.

    Args:
        grid: what is not black belongs to objects.
        by_colour: cells of one object have one colour.
        corners: cells touch at corners too.
    """
    rows, columns = grid.shape
    cells = grid.ravel().tolist()
    steps = SIDES + CORNERS if corners else SIDES
    seen = [not cell for cell in cells]
    parts = []
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
        parts.append(Part(at, across, box, colour))
    return parts


def draw_way(rng: Random) -> tuple[bool, bool]:
    """How a rule tells objects: by colour or not, at corners too or not."""
    return bool(rng.integers(2)), bool(rng.integers(2))


def box_of(mask: Grid) -> tuple[slice, slice]:
    """The smallest slices that hold all that is True, of which there has to be something."""
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
    return sum(padded[1 + down : 1 + down + rows, 1 + right : 1 + right + columns] for down, right in steps)


def slide(grid: Grid, part: Part, step: tuple[int, int], most: int) -> None:
    """Move an object in the grid itself, step by step, until the edge or something else is in the way."""
    values, (rows, columns) = grid[part.rows, part.columns], (part.rows, part.columns)
    grid[rows, columns] = BLACK
    for _ in range(most):
        r, c = rows + step[0], columns + step[1]
        inside = r.min() >= 0 and c.min() >= 0 and r.max() < grid.shape[0] and c.max() < grid.shape[1]
        if not inside or grid[r, c].any():
            break
        rows, columns = r, c
    grid[rows, columns] = values


def _touches(grid: Grid, part: Part) -> bool:
    own = np.zeros(grid.shape, dtype=bool)
    own[part.rows, part.columns] = True
    return bool((~own & (grid != BLACK) & (neighbours_of(own, True) > 0)).any())


def _at_edge(grid: Grid, part: Part) -> bool:
    (rows, columns), (high, wide) = part.box, grid.shape
    return rows.start == 0 or columns.start == 0 or rows.stop == high or columns.stop == wide


RANKED: dict[str, Callable[[Grid, Part], int]] = {
    "size": lambda grid, part: part.size,
    "height": lambda grid, part: part.box[0].stop - part.box[0].start,
    "width": lambda grid, part: part.box[1].stop - part.box[1].start,
    "area": lambda grid, part: part.mask().size,
    "top": lambda grid, part: -part.box[0].start,
    "left": lambda grid, part: -part.box[1].start,
    "colours": lambda grid, part: len(set(grid[part.rows, part.columns].tolist())),
    "number of holes": lambda grid, part: len(parts_of(inside_of(part.mask().astype(int)).astype(int), True, False)),
}
YES_OR_NO: dict[str, Callable[[Grid, Part], bool]] = {
    "holes": lambda grid, part: part.size < part.mask().size and bool(inside_of(part.mask().astype(int)).any()),
    "full": lambda grid, part: part.size == part.mask().size,
    "wide": lambda grid, part: part.mask().shape[1] > part.mask().shape[0],
    "symmetric": lambda grid, part: bool((part.mask() == part.mask()[:, ::-1]).all()),
    "edge": _at_edge,
    "square": lambda grid, part: part.mask().shape[0] == part.mask().shape[1],
    "even": lambda grid, part: part.size % 2 == 0,
    "touches": _touches,
}


def _choice(rng: Random) -> tuple[dict[str, Any], Callable[[Grid, list[Part]], list[Part]]]:
    # A rule that chooses objects: the most of something, the least, those that are so, those of a colour or shape.
    kind = pick(rng, ["most", "least", "yes", "no", "alone", "common"])
    feature = pick(rng, list(RANKED if kind in ("most", "least") else YES_OR_NO))
    if kind in ("alone", "common"):
        feature = pick(rng, ["colour", "shape", "size"])

    def choose(grid: Grid, parts: list[Part]) -> list[Part]:
        if not parts:
            raise Unfit("no objects")
        if kind in ("alone", "common"):
            of = {
                "colour": lambda part: part.colour,
                "shape": lambda part: (part.mask().shape, part.mask().tobytes()),
                "size": lambda part: part.size,
            }[feature]
            values = [of(part) for part in parts]
            counts = [values.count(value) for value in values]
            wanted = 1 if kind == "alone" else max(counts)
            chosen = [part for part, count in zip(parts, counts, strict=True) if count == wanted]
            distinct = len({v for v, count in zip(values, counts, strict=True) if count == wanted})
            if (kind == "alone" and len(chosen) != 1) or (kind == "common" and (distinct != 1 or wanted == 1)):
                raise Unfit("no single choice")
        else:
            values = [(RANKED | YES_OR_NO)[feature](grid, part) for part in parts]
            if kind in ("yes", "no"):
                chosen = [part for part, value in zip(parts, values, strict=True) if value == (kind == "yes")]
            else:
                best = (max if kind == "most" else min)(values)
                chosen = [part for part, value in zip(parts, values, strict=True) if value == best]
                if len(chosen) != 1:
                    raise Unfit("no single choice")
        if not chosen or len(chosen) == len(parts):
            raise Unfit("all objects, or none")
        return chosen

    return {"choice": kind, "of": feature}, choose


OBJECTS = ("objects", "dirty_objects", "alike_objects")


@operation(*OBJECTS, "bars", "marks", "lines", "boxed", "stacked")
def keep_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Keep the chosen objects, or all others."""
    way, (parameters, choose), kept = draw_way(rng), _choice(rng), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, *way)
        changed = np.zeros_like(grid) if kept else grid.copy()
        for part in choose(grid, parts):
            changed[part.rows, part.columns] = grid[part.rows, part.columns] if kept else BLACK
        return changed

    return {"way": way, **parameters, "keep": kept}, solve


@operation(*OBJECTS, "bars", "marks", "boxed", "stacked")
def cut_out(rng: Random, colours: Sequence[int]) -> Made:
    """Cut out the box of the one chosen object."""
    way, (parameters, choose), alone = draw_way(rng), _choice(rng), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        chosen = choose(grid, parts_of(grid, *way))
        if len(chosen) != 1:
            raise Unfit("several objects")
        [part] = chosen
        if alone:  # without what else is in its box
            return np.where(part.mask(), grid[part.box], BLACK)
        return grid[part.box]

    return {"way": way, **parameters, "alone": alone}, solve


@operation(*OBJECTS, "bars", "marks", "lines", "boxed", "stacked")
def recolour_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Give the chosen objects a colour, and the others another one or their own."""
    way, (parameters, choose) = draw_way(rng), _choice(rng)
    first, second = (int(colour) for colour in rng.permutation(9)[:2] + 1)
    both = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        changed = np.where(grid != BLACK, second, BLACK) if both else grid.copy()
        for part in choose(grid, parts_of(grid, *way)):
            changed[part.rows, part.columns] = first
        return changed

    return {"way": way, **parameters, "colour": first, "others": second if both else None}, solve


@operation(*OBJECTS, "bars")
def colour_by_rank(rng: Random, colours: Sequence[int]) -> Made:
    """Colour objects by the order of something: the first, the second, and so on."""
    way, feature = draw_way(rng), pick(rng, list(RANKED))
    ranks = (rng.permutation(9) + 1).tolist()
    most = int(rng.integers(2, 5))

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, *way)
        values = [RANKED[feature](grid, part) for part in parts]
        order = sorted(set(values), reverse=True)
        if not 2 <= len(order) <= most:
            raise Unfit("too few or many ranks")
        changed = np.zeros_like(grid)
        for part, value in zip(parts, values, strict=True):
            changed[part.rows, part.columns] = ranks[order.index(value)]
        return changed

    return {"way": way, "of": feature, "colours": ranks[:most]}, solve


@operation(*OBJECTS, "marks", "bars", "noise")
def colour_by_size(rng: Random, colours: Sequence[int]) -> Made:
    """Colour objects by their number of cells."""
    way, table = draw_way(rng), (rng.permutation(9) + 1).tolist()
    limit = int(rng.integers(2, 5))

    def solve(grid: Grid) -> Grid:
        changed = np.zeros_like(grid)
        for part in parts_of(grid, *way):
            changed[part.rows, part.columns] = table[min(part.size, limit) - 1]
        return changed

    return {"way": way, "colours": table[:limit]}, solve


@operation("dirty_objects")
def colour_by_touch(rng: Random, colours: Sequence[int]) -> Made:
    """Give objects the colour of the single cell that touches them, which goes away or stays."""
    corners, stays = bool(rng.integers(2)), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        parts, changed = parts_of(grid, True, True), grid.copy()
        cells = np.zeros_like(grid)
        for part in parts:
            if part.size == 1:
                cells[part.rows, part.columns] = part.colour
        for part in parts:
            if part.size == 1:
                continue
            own = np.zeros(grid.shape, dtype=bool)
            own[part.rows, part.columns] = True
            near = (neighbours_of(own, corners) > 0) & (cells != BLACK)
            found = set(cells[near].tolist())
            if len(found) > 1:
                raise Unfit("several colours")
            if found:
                changed[own] = found.pop()
                if not stays:
                    changed[near] = BLACK
        return changed

    return {"corners": corners, "stays": stays}, solve


@operation(*OBJECTS, "marks", "model")
def move_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Move objects by a step, or as far as they can until the edge or another one; all of them or those of a colour."""
    way = draw_way(rng)
    down, right = pick(rng, SIDES + CORNERS)
    far = bool(rng.integers(2))
    count = int(rng.integers(1, 4))
    colour = int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, *way)
        # Those in front first, so that they are out of the way.
        parts.sort(key=lambda part: -max(down * part.rows + right * part.columns))
        changed = grid.copy()
        for part in parts:
            if colour not in (None, part.colour):
                continue
            slide(changed, part, (down, right), max(grid.shape) if far else count)
        return changed

    return {"way": way, "down": down, "right": right, "steps": None if far else count, "colour": colour}, solve


@operation(*OBJECTS, "symmetric", "model")
def turn_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Mirror each object in its own box."""
    way, axis = draw_way(rng), pick(rng, ["left-right", "top-bottom", "both"])

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        parts = parts_of(grid, *way)
        for part in parts:
            changed[part.rows, part.columns] = BLACK
        for part in parts:
            cut = np.where(part.mask(), grid[part.box], BLACK)
            cut = cut[:, ::-1] if axis == "left-right" else cut[::-1] if axis == "top-bottom" else cut[::-1, ::-1]
            place = changed[part.box]
            place[cut != BLACK] = cut[cut != BLACK]
        return changed

    return {"way": way, "axis": axis}, solve


@operation(*OBJECTS, "boxed", "stacked")
def outline(rng: Random, colours: Sequence[int]) -> Made:
    """Colour the black cells around objects."""
    colour, corners = int(rng.integers(1, 10)), bool(rng.integers(2))
    return {"colour": colour, "corners": corners}, lambda grid: np.where(
        (grid == BLACK) & (neighbours_of(grid != BLACK, corners) > 0), colour, grid
    )


@operation(*OBJECTS, "marks", "model")
def fill_boxes(rng: Random, colours: Sequence[int]) -> Made:
    """Fill the box of each object with its colour or another one, behind what is there."""
    way, colour = draw_way(rng), int(rng.integers(1, 10)) if rng.random() < 0.6 else None

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, *way):
            box = changed[part.box]
            box[box == BLACK] = part.colour if colour is None else colour
        return changed

    return {"way": way, "colour": colour}, solve


@operation(*OBJECTS, "noise", "boxed")
def fill_inside(rng: Random, colours: Sequence[int]) -> Made:
    """Colour what is enclosed; or what is not."""
    colour, inside = int(rng.integers(1, 10)), bool(rng.random() < 0.7)
    return {"colour": colour, "inside": inside}, lambda grid: np.where(
        inside_of(grid) if inside else (grid == BLACK) & ~inside_of(grid), colour, grid
    )


@operation(*OBJECTS)
def hollow(rng: Random, colours: Sequence[int]) -> Made:
    """Take out the cells inside of objects, or colour them."""
    colour, corners = (0 if rng.random() < 0.4 else int(rng.integers(1, 10))), bool(rng.integers(2))
    return {"colour": colour, "corners": corners}, lambda grid: np.where(
        (grid != BLACK) & (neighbours_of(grid != BLACK, corners) == (8 if corners else 4)), colour, grid
    )


@operation(*OBJECTS, "marks", "bars", "boxed", "model")
def count_objects(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with a cell for each object: a row, a diagonal, the first cells of a square, or their colours in order."""
    way, colour, form = draw_way(rng), int(rng.integers(1, 10)), pick(rng, ["row", "diagonal", "square", "colours"])
    side = 3

    def solve(grid: Grid) -> Grid:
        parts = parts_of(grid, *way)
        if not parts:
            raise Unfit("no objects")
        if form == "colours":  # one cell of each, the largest first
            sizes = [part.size for part in parts]
            if len(set(sizes)) < len(sizes):
                raise Unfit("no order")
            parts.sort(key=lambda part: -part.size)
            return np.array([[part.colour for part in parts]])
        if form == "diagonal":
            return np.diag(np.full(len(parts), colour))
        if form == "row":
            return np.full((1, len(parts)), colour)
        if len(parts) > side * side:
            raise Unfit("too many")
        changed = np.zeros((side, side), dtype=int)
        changed.flat[: len(parts)] = colour
        return changed

    return {"way": way, "colour": colour, "form": form}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Cells and their neighbours


@operation("marks", "lines", "model")
def stamp(rng: Random, colours: Sequence[int]) -> Made:
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
def shoot(rng: Random, colours: Sequence[int]) -> Made:
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
def connect(rng: Random, colours: Sequence[int]) -> Made:
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
def fill_lines(rng: Random, colours: Sequence[int]) -> Made:
    """Fill the rows, columns or both in which some colour is, or in which nothing is."""
    axes, empty = pick(rng, [(0,), (1,), (0, 1)]), bool(rng.random() < 0.3)
    only = int(pick(rng, colours))
    drawn = int(rng.integers(1, 10))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for axis in axes:
            turned, source = (changed.T, grid.T) if axis else (changed, grid)
            hit = ~source.any(axis=1) if empty else (source == only).any(axis=1)
            part = turned[hit]
            part[part == BLACK] = drawn
            turned[hit] = part
        return changed

    return {"axes": axes, "empty": empty, "only": only, "colour": drawn}, solve


@operation("noise", "objects", "dirty_objects", "marks", "lines")
def neighbour_rule(rng: Random, colours: Sequence[int]) -> Made:
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
def colour_by_place(rng: Random, colours: Sequence[int]) -> Made:
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


@operation()
def map_colours(rng: Random, colours: Sequence[int]) -> Made:
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
def invert(rng: Random, colours: Sequence[int]) -> Made:
    """Exchange the background and the one colour that there is."""

    def solve(grid: Grid) -> Grid:
        found = set(grid.ravel().tolist()) - {BLACK}
        if len(found) != 1:
            raise Unfit("not one colour")
        return np.where(grid == BLACK, found.pop(), BLACK)

    return {}, solve


@operation("dirty_objects", "noise")
def clean(rng: Random, colours: Sequence[int]) -> Made:
    """Take away cells that stand alone, or small objects."""
    corners, limit = bool(rng.integers(2)), int(rng.integers(1, 4))

    def solve(grid: Grid) -> Grid:
        changed = grid.copy()
        for part in parts_of(grid, True, corners):
            if part.size <= limit:
                changed[part.rows, part.columns] = BLACK
        return changed

    return {"corners": corners, "limit": limit}, solve


@operation("noise", "marks", "bars", "objects", "model")
def fall(rng: Random, colours: Sequence[int]) -> Made:
    """Let the cells of each column fall, all coloured ones or those of one colour, which the others make room for."""
    only = int(pick(rng, colours)) if rng.random() < 0.4 else None

    def solve(grid: Grid) -> Grid:
        key = grid == only if only is not None else grid != BLACK
        return np.take_along_axis(grid, np.argsort(key, axis=0, kind="stable"), axis=0)

    return {"only": only}, solve


# ---------------------------------------------------------------------------------------------------------------------
# Whole grids


@operation()
def turn(rng: Random, colours: Sequence[int]) -> Made:
    """Turn or mirror the grid."""
    number = int(rng.integers(1, 8))
    return {"symmetry": number}, lambda grid: dihedral(grid, number)


@operation("noise", "marks", "objects", "bars", "alike_objects")
def tile(rng: Random, colours: Sequence[int]) -> Made:
    """Put copies of the grid beside each other, each turned in its own way."""
    high, wide = pick(rng, [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3)])
    plain = rng.random() < 0.3
    # Of grids that are not square only mirror images fit.
    numbers = np.zeros((high, wide), dtype=int) if plain else 2 * rng.integers(0, 4, size=(high, wide))

    def solve(grid: Grid) -> Grid:
        return np.vstack([np.hstack([dihedral(grid, int(number)) for number in row]) for row in numbers])

    return {"symmetries": numbers.tolist()}, solve


@operation("noise", "marks")
def tile_by_cells(rng: Random, colours: Sequence[int]) -> Made:
    """Put a copy of the grid where it has a coloured cell (or a black one), and nothing elsewhere."""
    black = bool(rng.random() < 0.3)

    def solve(grid: Grid) -> Grid:
        where = np.kron((grid == BLACK) == black, np.ones(grid.shape, dtype=int))
        return where * np.tile(grid, grid.shape)

    return {"black": black}, solve


@operation("noise", "marks", "objects", "alike_objects")
def enlarge(rng: Random, colours: Sequence[int]) -> Made:
    """Make every cell a block."""
    high, wide = pick(rng, [(2, 2), (3, 3), (1, 2), (2, 1)])
    block = np.ones((high, wide), dtype=int)
    return {"rows": high, "columns": wide}, lambda grid: np.kron(grid, block)


@operation("noise", "symmetric", "periodic", "objects")
def take_part(rng: Random, colours: Sequence[int]) -> Made:
    """Take a half, a quarter, every second line, or what is inside the edge."""
    kind = pick(rng, ["left", "right", "top", "bottom", "corner", "second", "inner"])
    parts = {
        "left": lambda grid: grid[:, : -(-grid.shape[1] // 2)],
        "right": lambda grid: grid[:, grid.shape[1] // 2 :],
        "top": lambda grid: grid[: -(-grid.shape[0] // 2)],
        "bottom": lambda grid: grid[grid.shape[0] // 2 :],
        "corner": lambda grid: grid[: -(-grid.shape[0] // 2), : -(-grid.shape[1] // 2)],
        "second": lambda grid: grid[::2, ::2],
        "inner": lambda grid: grid[1:-1, 1:-1],
    }

    def solve(grid: Grid) -> Grid:
        part = parts[kind](grid)
        if not part.size:
            raise Unfit("nothing is left")
        return part

    return {"part": kind}, solve


@operation("objects", "marks", "dirty_objects", "lines", "alike_objects", "model", "stacked")
def squeeze(rng: Random, colours: Sequence[int]) -> Made:
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
        rows, columns = grid.any(axis=1), grid.any(axis=0)
        if kind == "around":
            rows, columns = (np.logical_or.accumulate(line) for line in (rows, columns))
            rows = rows & np.logical_or.accumulate(grid.any(axis=1)[::-1])[::-1]
            columns = columns & np.logical_or.accumulate(grid.any(axis=0)[::-1])[::-1]
        return grid[rows][:, columns]

    return {"what": kind}, solve


@operation("noise", "marks", "objects", "bars")
def surround(rng: Random, colours: Sequence[int]) -> Made:
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
def shift(rng: Random, colours: Sequence[int]) -> Made:
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
def sort_lines(rng: Random, colours: Sequence[int]) -> Made:
    """Put rows or columns in the order of how many coloured cells they have."""
    axis, upwards = int(rng.integers(2)), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        turned = grid.T if axis else grid
        counts = np.count_nonzero(turned, axis=1)
        turned = turned[np.argsort(counts if upwards else -counts, kind="stable")]
        return turned.T if axis else turned

    return {"axis": axis, "upwards": upwards}, solve


@operation("noise", "marks", "symmetric", "bars", "objects")
def fold(rng: Random, colours: Sequence[int]) -> Made:
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
def level_lines(rng: Random, colours: Sequence[int]) -> Made:
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
def complete(rng: Random, colours: Sequence[int]) -> Made:
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
def show_covered(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with what the black box of a symmetric pattern covers."""

    def solve(grid: Grid) -> Grid:
        rows, columns = np.nonzero(grid == BLACK)
        if not len(rows):
            raise Unfit("no box")
        filled = grid
        for number in (4, 2, 6, 1):
            if number != 1 or grid.shape[0] == grid.shape[1]:
                filled = np.where(filled == BLACK, dihedral(filled, number), filled)
        part = filled[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if (part == BLACK).any():
            raise Unfit("not shown elsewhere")
        return part

    return {}, solve


@operation("periodic")
def continue_pattern(rng: Random, colours: Sequence[int]) -> Made:
    """Fill the black cells of a pattern that repeats itself, by its smallest period."""

    def solve(grid: Grid) -> Grid:
        rows, columns = np.indices(grid.shape)
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


# ---------------------------------------------------------------------------------------------------------------------
# Panels, counting


def _panels(grid: Grid) -> list[Grid]:
    # The parts beside lines of one colour from top to bottom, all of one size.
    [lines_at] = np.nonzero((grid == grid[0]).all(axis=0) & (grid[0] != BLACK))
    for colour in dict.fromkeys(grid[0, lines_at].tolist()):
        at = [int(place) for place in lines_at if grid[0, place] == colour]
        parts = np.split(grid, [i for place in at for i in (place, place + 1)], axis=1)[::2]
        if len(parts) > 1 and len({part.shape for part in parts}) == 1 and parts[0].size:
            return parts
    raise Unfit("no panels")


@operation("panels")
def combine_panels(rng: Random, colours: Sequence[int]) -> Made:
    """Lay the panels over each other: colour cells by how many of them have one there."""
    colour = int(rng.integers(1, 10))
    kind = pick(rng, ["all", "any", "one", "none", "first", "differ"])

    def solve(grid: Grid) -> Grid:
        masks = np.stack([part != BLACK for part in _panels(grid)])
        count = masks.sum(axis=0)
        where = {
            "all": count == len(masks), "any": count > 0, "one": count == 1, "none": count == 0,
            "first": masks[0] & (count == 1), "differ": (count > 0) & (count < len(masks)),
        }[kind]  # fmt: skip
        return np.where(where, colour, BLACK)

    return {"kind": kind, "colour": colour}, solve


@operation("panels")
def overlay_panels(rng: Random, colours: Sequence[int]) -> Made:
    """Lay the panels over each other, the first or the last on top."""
    last = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        parts = _panels(grid)
        changed = np.zeros_like(parts[0])
        for part in parts if last else reversed(parts):
            changed = np.where(part != BLACK, part, changed)
        return changed

    return {"top": "last" if last else "first"}, solve


@operation("panels")
def choose_panel(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with the panel that has most or fewest coloured cells, or colours, or is symmetric as no other."""
    kind = pick(rng, ["cells", "fewest", "colours", "symmetric", "first", "last"])

    def solve(grid: Grid) -> Grid:
        parts = _panels(grid)
        if kind in ("first", "last"):
            return parts[0 if kind == "first" else -1]
        values = [
            len(set(part.ravel().tolist()) - {BLACK}) if kind == "colours"
            else int((part == part[::-1]).all()) if kind == "symmetric"
            else np.count_nonzero(part) * (-1 if kind == "fewest" else 1)
            for part in parts
        ]  # fmt: skip
        if values.count(max(values)) != 1:
            raise Unfit("no single choice")
        return parts[int(np.argmax(values))]

    return {"kind": kind}, solve


@operation("noise", "marks", "objects", "bars", "lines", "dirty_objects", "stacked")
def count_colours(rng: Random, colours: Sequence[int]) -> Made:
    """Answer with the colours by how often they occur: the most or least common one, or bars of their cells."""
    kind = pick(rng, ["most", "least", "order", "bars", "fill"])

    def solve(grid: Grid) -> Grid:
        counts = np.bincount(grid.ravel(), minlength=10)
        counts[BLACK] = 0
        found = np.nonzero(counts)[0]
        if not len(found) or len(set(counts[found].tolist())) != len(found):
            raise Unfit("no order")
        order = found[np.argsort(-counts[found])]
        if kind in ("most", "least", "fill") and len(order) < 2:
            raise Unfit("one colour")
        if kind == "most":
            return np.array([[order[0]]])
        if kind == "least":
            return np.array([[order[-1]]])
        if kind == "fill":
            return np.where(grid != BLACK, order[0], BLACK)
        if kind == "order":
            return order[:, None]
        changed = np.zeros((len(order), int(counts[order[0]])), dtype=int)
        for row, colour in enumerate(order):
            changed[row, : counts[colour]] = colour
        return changed

    return {"kind": kind}, solve


from arc.generation import concepts  # noqa: E402, F401  (registers its own, for which all of this has to be there)
