"""Operations on boxes that lie over each other: which is on top, in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import box_of, colours_of
from arc.generation.rules import Grid, Operation, Operations, Random, Unfit, pick, registering

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


def _layers(grid: Grid) -> list[tuple[int, tuple[slice, slice]]]:
    # Colours and their boxes, from the lowest: in the box of one on top no other colour is to be seen.
    left = {colour: box_of(grid == colour) for colour in sorted(colours_of(grid))}
    layers: list[tuple[int, tuple[slice, slice]]] = []
    while left:
        top = [colour for colour, box in left.items() if not (colours_of(grid[box]) & {*left}) - {colour}]
        if len(top) != 1:
            raise Unfit("no order")
        layers.insert(0, (top[0], left.pop(top[0])))
    if len(layers) < 2:
        raise Unfit("nothing is over anything")
    return layers


@operation("stacked")
def list_layers(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with the colour on top, the lowest one, or all in their order."""
    kind, row = pick(rng, ["top", "lowest", "down", "up"]), bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        order = [colour for colour, _ in _layers(grid)]  # upwards
        listed = {"top": order[-1:], "lowest": order[:1], "down": order[::-1], "up": order}[kind]
        return np.array([listed]) if row else np.array([listed]).T

    return {"kind": kind, "row": row}, solve


@operation("stacked")
def restack(rng: Random, colours: Sequence[int]) -> Operation:
    """Bring the lowest box to the top, take the topmost away, or turn the order round."""
    kind = pick(rng, ["raise", "lift", "reverse"])

    def solve(grid: Grid) -> Grid:
        layers, changed = _layers(grid), np.zeros_like(grid)
        for colour, box in {"raise": [*layers[1:], layers[0]], "lift": layers[:-1], "reverse": layers[::-1]}[kind]:
            changed[box] = colour
        return changed

    return {"kind": kind}, solve


@operation("stacked")
def exchange_layers(rng: Random, colours: Sequence[int]) -> Operation:
    """Give each box the colour of the next one, or the colours in reverse order."""
    reverse = bool(rng.integers(2))

    def solve(grid: Grid) -> Grid:
        order, table = [colour for colour, _ in _layers(grid)], np.arange(10)
        table[order] = order[::-1] if reverse else [*order[1:], order[0]]
        return table[grid]

    return {"reverse": reverse}, solve
