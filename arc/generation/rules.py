"""What families, scenes and operations share: a rule, which draws inputs and solves them, and pairs drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Grid = np.ndarray  # (rows, columns), integers 0..9
Random = np.random.Generator
MIN_SIDE = 3  # the least `max_side`: on smaller grids some rules change nothing
MISSES = 2000  # inputs in a row that come again or do not change, after which a rule counts as exhausted


Solve = Callable[[Grid], Grid]
Draw = Callable[[Random], Grid]
Operation = tuple[dict[str, Any], Solve]  # an operation's parameters, and what it does to a grid
# By name: the function (random numbers, colours of the scene) -> operation, and the scenes that it suits.
Operations = dict[str, tuple[Callable[[Random, Sequence[int]], Operation], tuple[str, ...]]]
BLACK = 0  # the background; views give it other colours
SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


class Rule(NamedTuple):
    """One task's rule, with its parameters fixed.

    Args:
        parameters: what was drawn for this task, as JSON can hold it. Two tasks of a family have different ones.
        draw: draws an input grid.
        solve: computes the output grid of an input, which stays as it is.
    """

    parameters: dict[str, Any]
    draw: Callable[[Random], Grid]
    solve: Callable[[Grid], Grid]


class TooFewExamplesError(ValueError):
    """A rule has fewer different examples than were asked for."""


class Unfit(ValueError):
    """An operation does not fit a grid: there is nothing to do, or no clear choice."""


def registering(operations: Operations) -> Callable[..., Callable]:
    """A decorator that adds a function to `operations` under its name.

    Args:
        operations: the mapping that is added to.

    Returns:
        The decorator. Its arguments are the names of the scenes that the operation suits. As the first operation of a
        program it gets only these; after other operations these are preferred.
    """

    def operation(*scenes: str) -> Callable[[Callable], Callable]:
        def register(function: Callable[[Random, Sequence[int]], Operation]) -> Callable:
            operations[function.__name__] = function, scenes
            return function

        return register

    return operation


def pick(rng: Random, choices: Sequence[Any]) -> Any:
    """One of `choices`, unchanged. (`Generator.choice` would turn it into an element of an array.)"""
    return choices[int(rng.integers(len(choices)))]


def draw_pairs(rule: Rule, rng: Random, count: int) -> list[tuple[Grid, Grid]]:
    """Draw pairs with different inputs, whose outputs differ from their inputs.

    Raises:
        TooFewExamplesError: the rule has fewer than `count`.
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
