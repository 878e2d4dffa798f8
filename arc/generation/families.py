"""Families of rules: each draws a rule's parameters, and the rule draws inputs and solves them.

To add a family: write a function that draws a rule's parameters and register it with @family (`flip` is the shortest).
No side of an input or output is above `max_side`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arc.generation.rules import MIN_SIDE, Grid, Random, Rule, draw_pairs, pick
from arc.puzzles.grids import MAX_SIDE

FAMILIES: dict[str, Callable[[Random, int], Rule]] = {}  # name -> function (random numbers, largest side) -> a rule


def family(function: Callable[[Random, int], Rule]) -> Callable[[Random, int], Rule]:
    """Register a family of rules under its function's name, with "-" for "_" (puzzle ids cannot hold "_")."""
    FAMILIES[function.__name__.replace("_", "-")] = function
    return function


def noise(rng: Random, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
    """A grid of random colours; `rows` and `columns` are the lowest and highest number of each."""
    return rng.integers(0, 10, size=(rng.integers(*rows, endpoint=True), rng.integers(*columns, endpoint=True)))


def sparse(rng: Random, rows: tuple[int, int], columns: tuple[int, int], share: float = 0.4) -> Grid:
    """A black grid (0) in which about a `share` of the cells, at least one, is coloured (1..9)."""
    grid = noise(rng, rows, columns) % 9 + 1
    grid[rng.random(grid.shape) >= share] = 0
    if not grid.any():
        grid[rng.integers(grid.shape[0]), rng.integers(grid.shape[1])] = rng.integers(1, 10)
    return grid


DIRECTIONS = ("right", "left", "down", "up")


def pointing_right(grid: Grid, direction: str) -> Grid:
    """The grid turned so that `direction` points right. The same call on the result undoes it."""
    if direction in ("down", "up"):
        grid = grid.T
    if direction == "left":
        return grid[:, ::-1]
    if direction == "up":
        # Reversed on both sides of the transposition, so that applying it twice gives the grid back.
        return grid[::-1, ::-1]
    return grid


@family
def flip(rng: Random, max_side: int) -> Rule:
    """Mirror left and right, or top and bottom."""
    axis = pick(rng, ["left-right", "top-bottom"])
    sides = (2, max_side)
    return Rule({"axis": axis}, lambda r: noise(r, sides, sides), np.fliplr if axis == "left-right" else np.flipud)


@family
def rotate(rng: Random, max_side: int) -> Rule:
    """Turn by 90, 180 or 270 degrees counter-clockwise."""
    degrees = pick(rng, [90, 180, 270])
    sides = (2, max_side)
    return Rule({"degrees": degrees}, lambda r: noise(r, sides, sides), lambda grid: np.rot90(grid, degrees // 90))


@family
def transpose(rng: Random, max_side: int) -> Rule:
    """Mirror at the main diagonal or at the other one."""
    diagonal = pick(rng, ["main", "other"])
    sides = (2, max_side)
    solve = np.transpose if diagonal == "main" else lambda grid: np.rot90(grid, 2).T
    return Rule({"diagonal": diagonal}, lambda r: noise(r, sides, sides), solve)


@family
def recolour(rng: Random, max_side: int) -> Rule:
    """Replace every colour by another one, by a fixed map of all ten."""
    colours = rng.permutation(10)
    sides = (2, max_side)
    return Rule({"map": colours.tolist()}, lambda r: noise(r, sides, sides), lambda grid: colours[grid])


@family
def swap_colours(rng: Random, max_side: int) -> Rule:
    """Exchange two colours and leave the others."""
    low, high = sorted(rng.choice(10, size=2, replace=False).tolist())
    sides = (2, max_side)
    colours = np.arange(10)
    colours[[low, high]] = high, low
    return Rule({"colours": [low, high]}, lambda r: noise(r, sides, sides), lambda grid: colours[grid])


@family
def keep_colour(rng: Random, max_side: int) -> Rule:
    """Keep one colour and make all else black."""
    colour = int(rng.integers(1, 10))
    sides = (2, max_side)

    def draw(r: Random) -> Grid:
        grid = sparse(r, sides, sides, share=0.7)
        grid[r.random(grid.shape) < 0.3] = colour  # among nine colours alone it would be rare
        return grid

    return Rule({"colour": colour}, draw, lambda grid: np.where(grid == colour, grid, 0))


@family
def translate(rng: Random, max_side: int) -> Rule:
    """Move everything by some rows and columns; what leaves the grid is lost, or comes back on the other side."""
    steps = range(-2, 3)
    down, right = pick(rng, [(d, r) for d in steps for r in steps if (d, r) != (0, 0)])
    wrap = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        moved = np.roll(grid, (down, right), axis=(0, 1))
        if not wrap:
            rows, columns = (np.arange(n) - step for n, step in zip(grid.shape, (down, right), strict=True))
            inside = [(i >= 0) & (i < n) for i, n in zip((rows, columns), grid.shape, strict=True)]
            moved = np.where(inside[0][:, None] & inside[1][None, :], moved, 0)
        return moved

    sides = [(max(2, abs(step) + 1), max_side) for step in (down, right)]
    return Rule({"down": down, "right": right, "wrap": wrap}, lambda r: sparse(r, sides[0], sides[1]), solve)


@family
def gravity(rng: Random, max_side: int) -> Rule:
    """Let the coloured cells fall in one direction, each in its own line and order."""
    direction = pick(rng, DIRECTIONS)
    sides = (2, max_side)

    def solve(grid: Grid) -> Grid:
        lines = pointing_right(grid, direction)
        # A stable sort by "is coloured" moves the coloured cells to the right and keeps their order.
        order = np.argsort(lines != 0, axis=1, kind="stable")
        return pointing_right(np.take_along_axis(lines, order, axis=1), direction)

    return Rule({"direction": direction}, lambda r: sparse(r, sides, sides), solve)


@family
def rays(rng: Random, max_side: int) -> Rule:
    """From every coloured cell, colour the black ones in one direction up to the next coloured cell or the edge."""
    direction = pick(rng, DIRECTIONS)
    sides = (2, max_side)

    def solve(grid: Grid) -> Grid:
        lines = pointing_right(grid, direction)
        # Column of the last coloured cell so far; column 0 where there is none, which is black there.
        source = np.maximum.accumulate(np.where(lines != 0, np.arange(lines.shape[1]), 0), axis=1)
        return pointing_right(np.take_along_axis(lines, source, axis=1), direction)

    return Rule({"direction": direction}, lambda r: sparse(r, sides, sides, share=0.25), solve)


def _doubled_sides(direction: str, max_side: int) -> list[tuple[int, int]]:
    # Bounds of rows and columns for outputs that are twice as long in one direction.
    half, full = (1, max_side // 2), (2, max_side)
    return [full, half] if direction in ("right", "left") else [half, full]


@family
def mirror_extend(rng: Random, max_side: int) -> Rule:
    """Put the grid's mirror image beside it."""
    direction = pick(rng, DIRECTIONS)
    sides = _doubled_sides(direction, max_side)

    def solve(grid: Grid) -> Grid:
        lines = pointing_right(grid, direction)
        return pointing_right(np.hstack([lines, lines[:, ::-1]]), direction)

    return Rule({"direction": direction}, lambda r: noise(r, *sides), solve)


@family
def repeat(rng: Random, max_side: int) -> Rule:
    """Put a second copy of the grid beside or below it."""
    direction = pick(rng, ["right", "down"])
    sides = _doubled_sides(direction, max_side)
    tiles = (1, 2) if direction == "right" else (2, 1)
    return Rule({"direction": direction}, lambda r: noise(r, *sides), lambda grid: np.tile(grid, tiles))


@family
def scale(rng: Random, max_side: int) -> Rule:
    """Make every cell a block of some rows and columns."""
    # Only factors that leave inputs of three cells or more in one line: of fewer there are too few to choose from.
    factors = [
        f
        for f in itertools.product((1, 2, 3), repeat=2)
        if f != (1, 1) and (max_side // f[0]) * (max_side // f[1]) >= 3
    ]
    rows, columns = pick(rng, factors)
    sides = [(1, max_side // rows), (1, max_side // columns)]
    block = np.ones((rows, columns), dtype=int)
    return Rule({"rows": rows, "columns": columns}, lambda r: noise(r, *sides), lambda grid: np.kron(grid, block))


@family
def symmetrise(rng: Random, max_side: int) -> Rule:
    """Make one half the mirror image of the other, which `direction` points away from."""
    direction = pick(rng, DIRECTIONS)
    sides = (2, max_side)

    def solve(grid: Grid) -> Grid:
        lines = pointing_right(grid, direction).copy()
        half = lines.shape[1] // 2
        lines[:, -half:] = lines[:, :half][:, ::-1]
        return pointing_right(lines, direction)

    return Rule({"direction": direction}, lambda r: noise(r, sides, sides), solve)


@family
def border(rng: Random, max_side: int) -> Rule:
    """Colour the outermost rows and columns."""
    colour = int(rng.integers(10))
    sides = (3, max_side)

    def solve(grid: Grid) -> Grid:
        framed = np.full_like(grid, colour)
        framed[1:-1, 1:-1] = grid[1:-1, 1:-1]
        return framed

    return Rule({"colour": colour}, lambda r: noise(r, sides, sides), solve)


@family
def crop(rng: Random, max_side: int) -> Rule:
    """Cut out the smallest rectangle that holds everything but the background."""
    background = int(rng.integers(10))

    def draw(r: Random) -> Grid:
        canvas = np.full((r.integers(3, max_side + 1), r.integers(2, max_side + 1)), background)
        rows, columns = (int(r.integers(1, n + 1)) for n in canvas.shape)
        top, left = (int(r.integers(0, n - m + 1)) for n, m in zip(canvas.shape, (rows, columns), strict=True))
        shape = noise(r, (rows, rows), (columns, columns))
        canvas[top : top + rows, left : left + columns] = shape
        if (canvas == background).all():
            canvas[top, left] = (background + int(r.integers(1, 10))) % 10
        return canvas

    def solve(grid: Grid) -> Grid:
        rows, columns = np.nonzero(grid != background)
        return grid[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    return Rule({"background": background}, draw, solve)


@family
def count(rng: Random, max_side: int) -> Rule:
    """Answer with one row: as many cells of a colour as the grid has of it."""
    colour = int(rng.integers(1, 10))
    sides = (2, max_side)

    def draw(r: Random) -> Grid:
        grid = sparse(r, sides, sides)
        grid[grid == colour] = 0
        cells = r.permutation(grid.size)[: r.integers(1, min(max_side, grid.size) + 1)]
        grid.flat[cells] = colour
        return grid

    return Rule({"colour": colour}, draw, lambda grid: np.full((1, np.count_nonzero(grid == colour)), colour))


@family
def combine(rng: Random, max_side: int) -> Rule:
    """Lay the halves beside a line over each other: colour where both, either or just one of them is coloured."""
    operation = pick(rng, ["and", "or", "xor"])
    line, colour = (int(c) for c in rng.choice(np.arange(1, 10), size=2, replace=False))
    combined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[operation]

    def draw(r: Random) -> Grid:
        rows, columns = int(r.integers(2, max_side + 1)), int(r.integers(1, (max_side - 1) // 2 + 1))
        left, right = (sparse(r, (rows, rows), (columns, columns), share=0.5) for _ in range(2))
        return np.hstack([left, np.full((rows, 1), line), right])

    def solve(grid: Grid) -> Grid:
        half = grid.shape[1] // 2
        return np.where(combined(grid[:, :half] != 0, grid[:, half + 1 :] != 0), colour, 0)

    return Rule({"operation": operation, "line": line, "colour": colour}, draw, solve)


def generate(
    families: Sequence[str], tasks_per_family: int, examples: int, max_side: int, seed: int
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw tasks of families. No two tasks of a family have the same parameters.

    Args:
        families: names in FAMILIES.
        tasks_per_family: tasks of each family; one with fewer different rules gives as many as it has.
        examples: pairs of each task.
        max_side: largest side of any grid.
        seed: of everything that is drawn.

    Returns:
        By task name: the rule's parameters and the pairs.

    Raises:
        ValueError: settings out of range, or more examples than a rule has.
    """
    unknown = [name for name in families if name not in FAMILIES]
    problems = [
        (bool(unknown), f"unknown families {', '.join(unknown)}; there are {', '.join(FAMILIES)}"),
        (tasks_per_family < 1, f"--tasks_per_family is {tasks_per_family}: expected a whole number from 1"),
        (examples < 1, f"--examples is {examples}: expected a whole number from 1"),
        (not MIN_SIDE <= max_side <= MAX_SIDE, f"--max_side is {max_side}: expected {MIN_SIDE} to {MAX_SIDE}"),
        (seed < 0, f"--seed is {seed}: expected a whole number from 0"),
    ]
    if any(wrong for wrong, _ in problems):
        raise ValueError("; ".join(message for wrong, message in problems if wrong))
    tasks = {}
    for name in dict.fromkeys(families):
        taken: list[dict[str, Any]] = []
        code = zlib.crc32(name.encode())  # not hash(): that differs from process to process
        rule_rng = np.random.default_rng([seed, code])
        for number in range(tasks_per_family):
            rules = (FAMILIES[name](rule_rng, max_side) for _ in range(1000))
            rule = next((r for r in rules if r.parameters not in taken), None)
            if rule is None:  # the family's rules are used up
                break
            taken.append(rule.parameters)
            try:
                pairs = draw_pairs(rule, np.random.default_rng([seed, code, number]), examples)
            except ValueError as error:
                raise ValueError(f"{name} {rule.parameters}: {error}") from None
            tasks[f"{name}-{number}"] = (
                rule.parameters,
                [{"input": grid.tolist(), "output": solved.tolist()} for grid, solved in pairs],
            )
    return tasks
