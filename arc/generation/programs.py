"""Programs: rules put together at random from a scene and one to three operations on it.

A family has a handful of rules; there are endless programs. Each operation of a program matters: it changes the grid,
and without it the output would be different.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from arc.generation.operations import OPERATIONS
from arc.generation.processes import map_in_processes
from arc.generation.rules import (
    BLACK,
    MIN_SIDE,
    Grid,
    Operation,
    Random,
    Rule,
    Solve,
    TooFewExamplesError,
    Unfit,
    draw_pairs,
    pick,
)
from arc.generation.scenes import SCENES, Scene
from arc.puzzles.grids import MAX_SIDE

# A grid after some operations, and the grids of all shorter programs, which lack one of these operations or several.
State = tuple[Grid, list[Grid]]

PROGRAM = "program"  # prefix of the names of programs' tasks
MAX_EXAMPLES = 40  # of a program: most have endless examples, some have few
LENGTHS = (1, 1, 2, 2, 3)  # operations of a program
INPUTS, FITTING = 6, 4  # inputs that are drawn to try operations on, and how many of them an operation has to fit
# How often is tried again:
PROGRAM_TRIES = 400  # programs, until one has enough examples
SCENE_TRIES = 400  # scenes, until a program fits
SCENES_AN_OPERATION = 10  # scenes for one first choice of an operation, before another one is chosen
OPERATION_TRIES = 8  # operations for each place after the first
PARAMETER_TRIES = 2  # parameters of an operation
INPUT_TRIES = 20  # inputs, until all operations fit one


def draw_rule(rng: Random, max_side: int) -> Rule:
    """Draw a program.

    The number of operations, one operation and its place are drawn first, so that operations that seldom fit are as
    frequent as others. The other operations are tried until they fit.

    Args:
        rng: of all draws.
        max_side: largest side of any grid, from 3.

    Returns:
        The rule. For the inputs that it draws: each operation changes the grid, no program with fewer of its operations
        gives the same output, no side is above `max_side`, and the outputs are not all equal.

    Raises:
        RuntimeError: no program was found. This does not happen by chance.
    """
    length, names = pick(rng, LENGTHS), list(OPERATIONS)
    for number in range(SCENE_TRIES):
        if number % SCENES_AN_OPERATION == 0:
            wanted, place = pick(rng, names), int(rng.integers(length))
        kind = pick(rng, OPERATIONS[wanted][1])
        suiting = [name for name in names if kind in OPERATIONS[name][1] and len(OPERATIONS[name][1]) < len(SCENES)]
        scene = SCENES[kind](rng, max_side)
        states: list[State] = [(scene.draw(rng), []) for _ in range(INPUTS)]
        chosen: list[tuple[str, Operation]] = []
        for at in range(length):
            # An operation that comes twice often does no more than it does once, with other parameters.
            free = {*names} - {wanted, *(name for name, _ in chosen)}
            others = [[name for name in group if name in free] for group in (suiting, names)]
            groups = [[wanted]] if at == place else [group for group in others if group]
            step = _draw_operation(rng, scene, states, groups if at else groups[:1], max_side)
            if step is None:
                break
            states = step[2]
            chosen.append(step[:2])
        if len(chosen) < length:
            continue
        named = [{"operation": name, **parameters} for name, (parameters, _) in chosen]
        rule = _rule(scene, [solve for _, (_, solve) in chosen], max_side)
        return rule._replace(parameters={"scene": kind, **scene.parameters, "operations": named})
    raise RuntimeError(f"none of {SCENE_TRIES} programs does anything on grids of sides up to {max_side}")


def _draw_operation(
    rng: Random, scene: Scene, states: list[State], groups: Sequence[Sequence[str]], max_side: int
) -> tuple[str, Operation, list[State]] | None:
    # An operation of one of the groups that fits at least FITTING of the grids: its name, itself, the states after it.
    first = not states[0][1]
    present = np.unique(np.concatenate([grid.ravel() for grid, _ in states])).tolist()
    colours = scene.colours if first else [colour for colour in present if colour != BLACK] or scene.colours
    for _ in range(1 if first else OPERATION_TRIES):
        name = pick(rng, pick(rng, groups))
        for _ in range(PARAMETER_TRIES):
            operation = OPERATIONS[name][0](rng, colours)
            reached: list[State] = []
            for left, state in zip(range(len(states), 0, -1), states, strict=True):
                if len(reached) + left < FITTING:
                    break
                with contextlib.suppress(Unfit):
                    reached.append(_advance(state, operation[1], max_side))
            if len(reached) < FITTING:
                continue
            # The first operation may have few answers (a single cell). A later one must not make most outputs equal.
            different = len({(grid.shape, grid.tobytes()) for grid, _ in reached})
            if different >= max(2, 0 if first else len(reached) / 2):
                return name, operation, reached
    return None


def _apply(grid: Grid, step: Solve, max_side: int) -> Grid:
    changed = step(grid)
    if not 1 <= min(changed.shape) <= max(changed.shape) <= max_side:
        raise Unfit("too large, or nothing")
    return changed


def _advance(state: State, step: Solve, max_side: int) -> State:
    # Apply one operation to the grid and to those of the shorter programs, one of which is the grid as it was.
    grid, shorter = state
    changed = _apply(grid, step, max_side)
    if np.array_equal(changed, grid):
        raise Unfit("nothing changes")
    shorter = [*shorter, grid]
    for other in state[1]:
        with contextlib.suppress(Unfit):
            shorter.append(_apply(other, step, max_side))
    if any(np.array_equal(changed, other) for other in shorter):
        raise Unfit("some operation does not matter")
    return changed, shorter


def _rule(scene: Scene, steps: Sequence[Solve], max_side: int) -> Rule:
    last: list[Grid] = []  # the last input that was drawn, and its output

    def solve(grid: Grid) -> Grid:
        if last and last[0] is grid:
            return last[1]
        state: State = (grid, [])
        for step in steps:
            state = _advance(state, step, max_side)
        return state[0]

    def draw(rng: Random) -> Grid:
        for _ in range(INPUT_TRIES):
            grid = scene.draw(rng)
            try:
                last[:] = grid, solve(grid)
            except Unfit:
                continue
            return grid
        raise Unfit(f"not all operations fit any of {INPUT_TRIES} inputs")

    return Rule({}, draw, solve)


def draw_program(rng: Random, count: int, max_side: int) -> tuple[dict[str, Any], list[tuple[Grid, Grid]]]:
    """Draw a program that has enough examples, and the examples.

    Args:
        rng: of all draws.
        count: number of pairs.
        max_side: largest side of any grid.

    Returns:
        The program's parameters, and pairs as `draw_pairs` gives them.

    Raises:
        RuntimeError: no program was found. This does not happen by chance.
    """
    for _ in range(PROGRAM_TRIES):
        with contextlib.suppress(TooFewExamplesError, Unfit):
            rule = draw_rule(rng, max_side)
            return rule.parameters, draw_pairs(rule, rng, count)
    raise RuntimeError(f"none of {PROGRAM_TRIES} programs has {count} examples with sides up to {max_side}")


def generate_programs(
    programs: int, examples: int, max_side: int, seed: int, workers: int | None = None
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw tasks whose rules are programs. No two have the same scene and operations with the same parameters.

    Args:
        programs: number of tasks. A program that comes a second time is left out, so there can be fewer.
        examples: pairs of each task.
        max_side: largest side of any grid.
        seed: of everything that is drawn.
        workers: processes that draw; None: one a core. The tasks do not depend on it.

    Returns:
        By task name, `program-NUMBER`: the program's parameters and the pairs.

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
    tasks, taken = {}, set()
    for number, (parameters, pairs) in enumerate(map_in_processes(draw, range(programs), workers)):
        identity = json.dumps(parameters)
        if identity not in taken:
            taken.add(identity)
            tasks[f"{PROGRAM}-{number}"] = parameters, pairs
    return tasks


def _numbered_program(number: int, examples: int, max_side: int, seed: int) -> tuple[dict[str, Any], list[dict]]:
    rng = np.random.default_rng([seed, zlib.crc32(PROGRAM.encode()), number])
    parameters, pairs = draw_program(rng, examples, max_side)
    return parameters, [{"input": grid.tolist(), "output": solved.tolist()} for grid, solved in pairs]
