"""Make a dataset in the course format: one JSON file a task, each a list of input/output pairs of one rule.

    python demo/make_dataset.py --out demo_dataset
    python demo/make_dataset.py --out demo_dataset --tasks_per_family 4 --max_side 6 --families flip gravity
    python demo/make_dataset.py --programs 20000 --out programs --examples 7
    python demo/make_dataset.py --changed_from dataset --out changed --holdout_examples 800 --holdout_tasks 40
    python demo/make_dataset.py --from_rearc re_arc --out dataset --max_side 10

With --from_rearc: reads what re-arc has generated (metadata.json, tasks/*.json) and writes OUT/TASK.json with the pairs
of which no side is above --max_side, each input once, and OUT/rearc.txt: each file's checksum and counts. Nothing that
is there is replaced.

Else it generates small puzzles. Reads nothing. Writes OUT/FAMILY-NUMBER.json, one a task, and OUT/rules.txt: each
file's checksum and its rule's parameters. The files depend on the settings alone, and a task only on its family, its
number and the settings of its examples: asking for more tasks, more examples or other families leaves what there was as
it was. With --programs the rules are not those of families but put together at random (programs.py), no two of the
same scene and operations: OUT/program-NUMBER.json; a rule that has fewer examples than are asked for is left.

With --changed_from: loads a dataset and holds out of it what a stage with the same --sizes, --grid_sizes,
--dataset_seed and --holdout_... does, and changes all outputs of a --share of the puzzles that are left to train on by
one random operation each (programs.py): OUT/changed-PUZZLE.json, each a puzzle {"train", "test"}. Writes no puzzle
that has the same input as a held-out one; a held-out test pair that comes about in other colours or another orientation
is left out by the stage. What a puzzle becomes depends on its name, its outputs, --seed and --max_side.

To add a family: write a function that draws a rule's parameters and register it with @family (`flip` is the shortest).
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arc.puzzles.files import list_rearc, read_tasks
from arc.puzzles.grids import MAX_SIDE

Grid = np.ndarray  # (rows, columns), integers 0..9
Random = np.random.Generator

RULES_FILE = "rules.txt"  # not .json: whatever reads the folder takes every .json file for a task
REARC_FILE = "rearc.txt"
HEADER = "# Made by demo/make_dataset.py, which replaces this folder only while it holds nothing else."
REARC_HEADER = "# Made by demo/make_dataset.py from a re-arc folder."
MIN_SIDE = 3  # below it some rules have nothing to show
PROGRAM = "program"  # first part of the names of programs' tasks
PROGRAMS_TRIED = 400  # programs that are drawn for one that has enough examples
PROGRAMS_A_CALL = 50  # that a process draws at a time
CHANGED = "changed"  # first part of the names of puzzles with changed outputs
CHANGES_TRIED = 12  # operations that are drawn for a puzzle
MISSES = 2000  # draws in a row that repeat an earlier input or show nothing, after which a rule counts as exhausted


class Rule(NamedTuple):
    """One task's rule, with its parameters fixed.

    Args:
        parameters: what was drawn for this task, as JSON can hold it; tells the tasks of a family apart.
        draw: makes an input grid.
        solve: makes the output grid of an input; does not change it.
    """

    parameters: dict[str, Any]
    draw: Callable[[Random], Grid]
    solve: Callable[[Grid], Grid]


class TooFewExamplesError(ValueError):
    """A rule has fewer different examples than are asked for."""


FAMILIES: dict[str, Callable[[Random, int], Rule]] = {}  # name -> function (random numbers, largest side) -> a rule


def family(function: Callable[[Random, int], Rule]) -> Callable[[Random, int], Rule]:
    """Register a family of rules under its function's name, with "-" for "_" (puzzle ids cannot hold "_")."""
    FAMILIES[function.__name__.replace("_", "-")] = function
    return function


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def noise(rng: Random, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
    """A grid of any colours; `rows` and `columns` are bounds of its sides, both included."""
    return rng.integers(0, 10, size=(rng.integers(*rows, endpoint=True), rng.integers(*columns, endpoint=True)))


def sparse(rng: Random, rows: tuple[int, int], columns: tuple[int, int], share: float = 0.4) -> Grid:
    """A black grid (0) with coloured cells (1..9): about `share` of them, at least one."""
    grid = noise(rng, rows, columns) % 9 + 1
    grid[rng.random(grid.shape) >= share] = 0
    if not grid.any():
        grid[rng.integers(grid.shape[0]), rng.integers(grid.shape[1])] = rng.integers(1, 10)
    return grid


def pick(rng: Random, choices: Sequence[Any]) -> Any:
    """One of `choices`, as it is (numpy's own choice would turn it into an array's element)."""
    return choices[rng.integers(len(choices))]


# ---------------------------------------------------------------------------------------------------------------------
# Families. Each draws its parameters once: that makes a rule. No side of an input or output is above max_side.

DIRECTIONS = ("right", "left", "down", "up")


def pointing_right(grid: Grid, direction: str) -> Grid:
    """A view of the grid in which `direction` points to the right; the same call on that view undoes it."""
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
    return Rule({"down": down, "right": right, "wrap": wrap}, lambda r: sparse(r, *sides), solve)


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


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def draw_pairs(rule: Rule, rng: Random, count: int) -> list[tuple[Grid, Grid]]:
    """Draw pairs with distinct inputs, each of which shows the rule at work (its output differs from its input).

    Raises:
        TooFewExamplesError: the rule has not so many.
    """
    pairs: list[tuple[Grid, Grid]] = []
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    misses = 0
    while len(pairs) < count:
        grid = rule.draw(rng)
        identity = (grid.shape, grid.astype(np.uint8).tobytes())
        solved = rule.solve(grid)
        if identity in seen or np.array_equal(grid, solved):
            misses += 1
            if misses == MISSES:
                raise TooFewExamplesError(
                    f"found only {len(pairs)} distinct examples of {count}: "
                    "ask for fewer --examples or a larger --max_side"
                )
            continue
        misses = 0
        seen.add(identity)
        pairs.append((grid, solved))
    return pairs


def generate(
    families: Sequence[str], tasks_per_family: int, examples: int, max_side: int, seed: int
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw the tasks of the families; no two tasks of a family share their parameters.

    Args:
        families: names in FAMILIES.
        tasks_per_family: tasks of each; a family with fewer different rules gives as many as it has.
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


def draw_program(rng: Random, count: int, max_side: int) -> tuple[dict[str, Any], list[tuple[Grid, Grid]]]:
    """Draw a rule that is a program and has so many examples.

    Args:
        rng: of all draws.
        count: pairs.
        max_side: largest side of any grid.

    Returns:
        The program's parameters, and pairs as `draw_pairs` gives them.

    Raises:
        RuntimeError: none was found, which does not happen by chance.
    """
    from arc.generation.programs import Unfit, program

    for _ in range(PROGRAMS_TRIED):
        with contextlib.suppress(TooFewExamplesError, Unfit):
            rule = program(rng, max_side)
            return rule.parameters, draw_pairs(rule, rng, count)
    raise RuntimeError(f"none of {PROGRAMS_TRIED} programs has {count} examples with sides up to {max_side}")


def _numbered_program(number: int, examples: int, max_side: int, seed: int) -> tuple[dict[str, Any], list[dict]]:
    rng = np.random.default_rng([seed, zlib.crc32(PROGRAM.encode()), number])
    parameters, pairs = draw_program(rng, examples, max_side)
    return parameters, [{"input": grid.tolist(), "output": solved.tolist()} for grid, solved in pairs]


def _in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int | None) -> list[Any]:
    workers = min(workers or os.cpu_count() or 1, -(-len(items) // PROGRAMS_A_CALL))
    if workers <= 1:
        return list(map(function, items))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, items, chunksize=PROGRAMS_A_CALL)


def generate_programs(
    programs: int, examples: int, max_side: int, seed: int, workers: int | None = None
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw tasks whose rules are programs, no two of the same scene and operations with all their parameters.

    Args:
        programs: tasks; a program that comes a second time is left out, so that there can be fewer.
        examples: pairs of each task.
        max_side: largest side of any grid.
        seed: of everything that is drawn.
        workers: processes that draw, which makes no difference to what is drawn; None: one for each core.

    Returns:
        As `generate` does, `program-NUMBER`.

    Raises:
        ValueError: settings out of range.
    """
    problems = [
        (programs < 1, f"--programs is {programs}: expected a whole number from 1"),
        (not 1 <= examples <= MAX_EXAMPLES, f"--examples is {examples}: expected 1 to {MAX_EXAMPLES} of programs"),
        (not MIN_SIDE <= max_side <= MAX_SIDE, f"--max_side is {max_side}: expected {MIN_SIDE} to {MAX_SIDE}"),
        (seed < 0, f"--seed is {seed}: expected a whole number from 0"),
        (workers is not None and workers < 1, f"--workers is {workers}: expected a whole number from 1"),
    ]
    if any(wrong for wrong, _ in problems):
        raise ValueError("; ".join(message for wrong, message in problems if wrong))
    draw = functools.partial(_numbered_program, examples=examples, max_side=max_side, seed=seed)
    drawn = _in_processes(draw, range(programs), workers)
    tasks, taken = {}, set()
    for number, (parameters, pairs) in enumerate(drawn):
        identity = json.dumps(parameters)
        if identity not in taken:
            taken.add(identity)
            tasks[f"{PROGRAM}-{number}"] = parameters, pairs
    return tasks


def change_outputs(rng: Random, outputs: Sequence[Grid], max_side: int) -> tuple[dict[str, Any], list[Grid]] | None:
    """Change all outputs of a puzzle by one operation of the programs.

    Args:
        rng: of all draws.
        outputs: of the demonstrations and the tests.
        max_side: largest side of a changed output.

    Returns:
        The operation with its parameters, and the changed outputs, of which one at most is what it was, and which are
        not all alike; None if none of CHANGES_TRIED operations does that.
    """
    from arc.generation.programs import BLACK, OPERATIONS, Unfit

    names = list(OPERATIONS)
    colours = sorted({*np.concatenate([grid.ravel() for grid in outputs]).tolist()} - {BLACK}) or [1]
    for _ in range(CHANGES_TRIED):
        name = pick(rng, names)
        with contextlib.suppress(Unfit):
            parameters, solve = OPERATIONS[name][0](rng, colours)
            changed: list[Grid] = []
            same = 0
            for grid in outputs:
                made = solve(grid)
                same += np.array_equal(made, grid)
                if same > 1 or not 1 <= min(made.shape) <= max(made.shape) <= max_side:
                    break
                changed.append(made)
            if len(changed) == len(outputs) and not all(np.array_equal(changed[0], grid) for grid in changed):
                return {"operation": name, **parameters}, changed
    return None


def _changed_puzzle(
    puzzle: tuple[str, list[Grid]], max_side: int, seed: int
) -> tuple[dict[str, Any], list[Grid]] | None:
    name, outputs = puzzle
    from arc.puzzles.keys import seeded_rng

    return change_outputs(seeded_rng(seed, CHANGED, name), [grid.astype(int) for grid in outputs], max_side)


def generate_changed(
    folder: Path, share: float, max_side: int, seed: int, workers: int | None = None, **split: Any
) -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any]]], dict[str, Any]]:
    """Change the outputs of puzzles that a stage trains on, each puzzle's by an operation of its own.

    Args:
        folder: a dataset as the stages load it.
        share: of the puzzles; a larger one adds some and leaves the others as they are.
        max_side: largest side of a changed output.
        seed: of which puzzles, and of what is drawn for each.
        workers: processes that draw, which makes no difference to what is drawn; None: one for each core.
        split: settings of SPLIT, where they are not the stages' defaults; what they hold out is not used.

    Returns:
        By task name, `changed-PUZZLE`: the operation with its parameters, and the puzzle {"train", "test"}. And what it
        was made from: "split" (all its settings), "dataset" (a hash of all puzzles), and numbers of puzzles: "train",
        "looked_at", and of these "unfit" (no operation fits) and "heldout" (they have an input of a held-out puzzle).

    Raises:
        FileNotFoundError, ValueError: settings out of range, bad files, more held out than there is, or no task left.
    """
    from arc.puzzles.dataset import ArcDataset
    from arc.puzzles.keys import seeded_rng
    from arc.runs.settings import DataSettings

    problems = [
        (not 0 < share <= 1, f"--share is {share}: expected a share above 0, up to 1"),
        (not 1 <= max_side <= MAX_SIDE, f"--max_side is {max_side}: expected 1 to {MAX_SIDE}"),
        (workers is not None and workers < 1, f"--workers is {workers}: expected a whole number from 1"),
    ]
    settings = DataSettings(str(folder), **split)
    problems += [
        (value < 0, f"--{name} is {value}: expected a whole number from 0")
        for name, value in (
            ("seed", seed),
            *((name, getattr(settings, name)) for name in ("dataset_seed", "holdout_seed")),
        )
    ]
    if any(wrong for wrong, _ in problems):
        raise ValueError("; ".join(message for wrong, message in problems if wrong))
    bounds = tuple(settings.grid_sizes) or None  # and so on as training_tools.load_split does, which imports torch
    try:
        data = ArcDataset.load_from_local_json(
            folder, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
        )
        held = data.holdout(settings.holdout_examples, settings.holdout_tasks, settings.holdout_seed)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--changed_from: {error}") from None

    def inputs(ds: ArcDataset, puzzle: str) -> list[Grid]:
        return [pair["input"] for part in ("train", "test") for pair in ds.challenge[puzzle][part]]

    hidden = {
        (grid.shape, grid.tobytes())
        for part in (held.seen, held.unseen)
        for puzzle in part.challenge
        for grid in inputs(part, puzzle)
    }
    train = held.train
    drawn = [puzzle for puzzle in train.challenge if seeded_rng(seed, CHANGED, puzzle, "share").random() < share]
    # Small inputs come in several tasks: of those that are held out no other answer is to be learned either.
    usable = [p for p in drawn if not any((grid.shape, grid.tobytes()) in hidden for grid in inputs(train, p))]
    outputs = [[*(pair["output"] for pair in train.challenge[p]["train"]), *train.solutions.get(p, ())] for p in usable]
    change = functools.partial(_changed_puzzle, max_side=max_side, seed=seed)
    tasks = {}
    for puzzle, made in zip(
        usable, _in_processes(change, list(zip(usable, outputs, strict=True)), workers), strict=True
    ):
        if made is None:
            continue
        parameters, changed = made
        rows = [{"input": grid.tolist()} for grid in inputs(train, puzzle)]
        for row, grid in zip(rows, changed, strict=False):  # tests without solutions stay so
            row["output"] = grid.tolist()
        count = len(train.challenge[puzzle]["train"])
        tasks[f"{CHANGED}-{puzzle}"] = parameters, {"train": rows[:count], "test": rows[count:]}
    made_from = {
        "split": {name: getattr(settings, name) for name in SPLIT}, "dataset": data.content_hash(),
        "train": len(train.challenge), "looked_at": len(drawn), "unfit": len(usable) - len(tasks),
        "heldout": len(drawn) - len(usable),
    }  # fmt: skip
    if not tasks:
        raise ValueError(
            f"--changed_from: {folder}: no puzzle to write of {len(drawn)} looked at: no operation fits "
            f"{made_from['unfit']}, and {made_from['heldout']} have an input of a held-out puzzle"
        )
    return tasks, made_from


def from_rearc(
    folder: Path, max_side: int, min_pairs: int
) -> tuple[dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], dict[str, int]]:
    """Take the small pairs of re-arc's tasks, in their order.

    Args:
        folder: holds metadata.json and tasks/.
        max_side: largest side of any grid.
        min_pairs: tasks of fewer pairs are left out.

    Returns:
        By task name: how many pairs of how many, and the pairs, each input once. And the tasks that are left out, with
        the number of pairs that they would have.

    Raises:
        FileNotFoundError, ValueError: settings out of range, bad files (named by file, pair and row), or no task left.
    """
    problems = [
        f"{flag} is {value}: expected {expected}"
        for flag, value, low, high, expected in (
            ("--max_side", max_side, 1, MAX_SIDE, f"1 to {MAX_SIDE}"),
            ("--min_pairs", min_pairs, 1, np.inf, "a whole number from 1"),
        )
        if not low <= value <= high
    ]
    if problems:
        raise ValueError("; ".join(problems))
    files = list_rearc(folder)
    store, parsed = read_tasks(files)
    tasks, left_out = {}, {}
    for path, task in zip(files, parsed, strict=True):
        if task.tests >= 0:
            raise ValueError(f"{path}: found a puzzle with train and test pairs, expected a list of pairs")
        pairs: dict[tuple[tuple[int, ...], bytes], dict[str, list[list[int]]]] = {}
        for first in range(task.first, task.first + 2 * task.pairs, 2):
            grid, solved = store.grid(first), store.grid(first + 1)
            if max(*grid.shape, *solved.shape) <= max_side:
                pairs.setdefault(
                    (grid.shape, grid.tobytes()), {"input": grid.tolist(), "output": solved.tolist()}
                )  # the first of its input
        if len(pairs) < min_pairs:
            left_out[path.stem] = len(pairs)
        else:
            tasks[path.stem] = ({"pairs": len(pairs), "of": task.pairs}, list(pairs.values()))
    if not tasks:
        raise ValueError(
            f"{folder}: none of {len(files)} tasks has {min_pairs} pairs with sides up to {max_side}, the most are "
            f"{max(left_out.values())}: raise --max_side or lower --min_pairs"
        )
    return tasks, left_out


# ---------------------------------------------------------------------------------------------------------------------
# Files


def render(
    tasks: Mapping[str, tuple[dict[str, Any], Any]],
    listing: str = RULES_FILE,
    header: Sequence[str] = (HEADER, "# file, sha256, parameters of the rule"),
) -> dict[str, bytes]:
    """The files of a dataset by name; the last one, `listing`, lists the others with parameters and checksum."""
    files = {f"{name}.json": json.dumps(pairs, separators=(",", ":")).encode() for name, (_, pairs) in tasks.items()}
    lines = [
        f"{file} {hashlib.sha256(content).hexdigest()} {json.dumps(parameters)}"
        for (file, content), (parameters, _) in zip(files.items(), tasks.values(), strict=True)
    ]
    files[listing] = "\n".join([*header, *lines, ""]).encode()
    return files


def is_ours(folder: Path) -> bool:
    """Whether a folder holds exactly what an earlier run wrote: nothing added, nothing edited."""
    rules = folder / RULES_FILE
    if not rules.is_file():
        return False
    lines = rules.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0] != HEADER:
        return False
    listed = dict(line.split(" ", 2)[:2] for line in lines if line.count(" ") >= 2 and not line.startswith("#"))
    names = {path.name for path in folder.iterdir()}
    return names == {RULES_FILE, *listed} and all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in listed.items()
    )


def write_folder(files: dict[str, bytes], out: Path, replace: bool = True) -> bool:
    """Write the files as folder `out`, which appears complete or not at all.

    Args:
        files: by name.
        out: a folder of other settings is replaced, if this program wrote all of it.
        replace: False: it is not.

    Returns:
        False if they were there already.

    Raises:
        FileExistsError: `out` is a file, or holds something that is not to be replaced.
    """
    out = out.resolve()  # a link to a folder is replaced where it points
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: expected a folder; choose another --out")
    present = out.is_dir() and any(out.iterdir())
    if present:
        # Names first: of what may be any folder, nothing else is read.
        if {path.name for path in out.iterdir()} == set(files) and all(
            (out / name).is_file() and (out / name).read_bytes() == content for name, content in files.items()
        ):
            return False
        if not replace:
            raise FileExistsError(f"{out} holds other files than would be written: choose another --out")
        if not is_ours(out):
            raise FileExistsError(
                f"{out} holds files that this program did not write (or that were edited): choose another --out"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.{os.getpid()}.incomplete")
    beside.mkdir()
    try:
        for name, content in files.items():
            (beside / name).write_bytes(content)
        if present:  # only files whose checksums were just compared
            for path in out.iterdir():
                path.unlink()
        beside.replace(out)  # works on a missing folder and on an empty one
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


MAX_EXAMPLES = 40  # of a program: most have no end of them, others few
GENERATED = {"tasks_per_family": 2, "examples": 120, "max_side": 5, "seed": 42, "families": list(FAMILIES)}
DRAWN = {"examples": 7, "max_side": 10, "seed": 42, "workers": None}
# What decides which puzzles are held out; defaults are those of the stages.
SPLIT = ("sizes", "grid_sizes", "dataset_seed", "holdout_examples", "holdout_tasks", "holdout_seed")
ALTERED = {"share": 0.5, "max_side": 10, "seed": 42, "workers": None}
TAKEN = {"max_side": MAX_SIDE, "min_pairs": 7}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the dataset that the flags describe; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo_dataset"), help="folder to write (demo_dataset)")
    parser.add_argument("--tasks_per_family", type=int, help="tasks of each family (2)")
    parser.add_argument("--examples", type=int, help="input/output pairs of each task (120; of a program 7)")
    parser.add_argument(
        "--max_side", type=int, help=f"largest side of a grid (5; of programs 10; of re-arc's {MAX_SIDE})"
    )
    parser.add_argument("--seed", type=int, help="of everything that is drawn (42)")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--programs", type=int, help="tasks of programs put together at random, instead of families")
    parser.add_argument("--changed_from", type=Path, metavar="DIR", help="change outputs of a dataset's puzzles")
    parser.add_argument("--share", type=float, help="of the puzzles to train on that are changed (0.5)")
    for name in SPLIT:
        several = {"nargs": "+"} if name in ("sizes", "grid_sizes") else {}
        parser.add_argument(f"--{name}", type=int, help="as the stages have it: what they hold out", **several)
    parser.add_argument("--workers", type=int, help="processes that draw programs or changes (one for each core)")
    parser.add_argument("--from_rearc", type=Path, metavar="DIR", help="take re-arc's pairs instead of generating any")
    parser.add_argument("--min_pairs", type=int, help="tasks of re-arc with fewer pairs are left out (7)")
    args = parser.parse_args(argv)
    asked = {name: value for name, value in vars(args).items() if value is not None and name != "out"}
    modes = {"programs": DRAWN, "changed_from": ALTERED | dict.fromkeys(SPLIT), "from_rearc": TAKEN}
    try:
        chosen = [name for name in modes if name in asked]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in chosen)}: expected one of them")
        defaults, when = GENERATED, "without --programs, --changed_from and --from_rearc"
        if chosen:
            defaults, when = modes[chosen[0]], f"with --{chosen[0]}"
        useless = [f"--{name}" for name in asked if name not in {*defaults, *chosen}]
        if useless:
            raise ValueError(f"{' '.join(useless)}: of no use {when}")
        settings: dict[str, Any] = {**defaults, **asked}
        if args.from_rearc is not None:
            print_taken(args.out, settings.pop("from_rearc"), settings)
        elif args.changed_from is not None:
            given = {name: value for name, value in settings.items() if value is not None}
            print_changed(args.out, given.pop("changed_from"), given)
        elif args.programs is not None:
            print_drawn(args.out, settings)
        else:
            print_generated(args.out, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_generated(out: Path, settings: dict[str, Any]) -> None:
    """Generate a dataset, write it and say what it is."""
    tasks = generate(**settings)
    written = write_folder(render(tasks), out)
    families = list(dict.fromkeys(settings["families"]))
    print(
        f"{out}: {len(tasks)} tasks of {len(families)} families, {settings['examples']} examples each"
        + ("" if written else "; there already, unchanged")
    )
    for name in families:
        made = sum(task.rpartition("-")[0] == name for task in tasks)
        if made < settings["tasks_per_family"]:
            print(
                f"  {name} has only {made} different rules, so {made} tasks instead of {settings['tasks_per_family']}"
            )


def print_drawn(out: Path, settings: dict[str, Any]) -> None:
    """Draw programs, write their tasks and say how many there are."""
    tasks = generate_programs(**settings)
    written = write_folder(render(tasks), out)
    print(
        f"{out}: {len(tasks)} tasks of different programs, {settings['examples']} examples each"
        + ("" if written else "; there already, unchanged")
    )


def print_changed(out: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Change outputs of a dataset's puzzles, write them and say of how many."""
    if out.resolve() == folder.resolve():  # which this program may have written and would replace
        raise ValueError(f"--out and --changed_from are both {folder}: expected another --out")
    tasks, made_from = generate_changed(folder, **settings)
    drawn = {name: settings[name] for name in ("share", "max_side", "seed")}
    header = (HEADER, f"# {json.dumps({**drawn, **made_from})}", "# file, sha256, operation on the outputs")
    written = write_folder(render(tasks, header=header), out)
    print(
        f"{out}: {len(tasks):,} puzzles with changed outputs, of {made_from['looked_at']:,} looked at "
        f"({made_from['train']:,} to train on, --share {settings['share']})"
        + ("" if written else "; there already, unchanged")
    )
    print(
        f"  left out: {made_from['unfit']:,} without an operation that fits, {made_from['heldout']:,} with an input of "
        "a held-out puzzle"
    )


def print_taken(out: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Take re-arc's pairs, write them and say what was left out."""
    tasks, left_out = from_rearc(folder, **settings)
    header = (REARC_HEADER, f"# {json.dumps(settings)}", "# file, sha256, pairs taken")
    written = write_folder(render(tasks, REARC_FILE, header), out, replace=False)
    taken, of = (sum(counts[name] for counts, _ in tasks.values()) for name in ("pairs", "of"))
    print(
        f"{out}: {len(tasks)} tasks, {taken:,} of their {of:,} pairs"
        + ("" if written else "; there already, unchanged")
    )
    if left_out:
        named = ", ".join(f"{name} ({pairs})" for name, pairs in left_out.items())
        print(f"  left out: {len(left_out)} tasks with fewer than {settings['min_pairs']} pairs: {named}")
