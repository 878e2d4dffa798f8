"""Operations on panels in rows and columns: same and different, copy, count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.generation.objects import colours_of, index_of_best
from arc.generation.rules import BLACK, Grid, Operation, Operations, Random, Unfit, pick, registering
from arc.puzzles.keys import dihedral

OPERATIONS: Operations = {}
operation = registering(OPERATIONS)


def _panel_boxes(grid: Grid) -> list[list[tuple[slice, slice]]]:
    # Where the equal panels between the whole rows and columns of one colour are.
    for colour in sorted(colours_of(grid)):
        spans = []
        for axis in (1, 0):
            cuts = [-1, *np.nonzero((grid == colour).all(axis=axis))[0].tolist(), grid.shape[1 - axis]]
            spans.append([slice(begin + 1, end) for begin, end in zip(cuts, cuts[1:], strict=False)])
        sizes = [{span.stop - span.start for span in along} for along in spans]
        if all(len(size) == 1 and min(size) > 0 for size in sizes) and len(spans[0]) * len(spans[1]) > 1:
            return [[(down, right) for right in spans[1]] for down in spans[0]]
    raise Unfit("no panels")


@operation("table")
def summarise_panels(rng: Random, colours: Sequence[int]) -> Operation:
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
def odd_panel(rng: Random, colours: Sequence[int]) -> Operation:
    """Answer with the panel that is unlike all others, or has most or fewest coloured cells."""
    kind = pick(rng, ["unlike", "fullest", "emptiest"])

    def solve(grid: Grid) -> Grid:
        panels = [grid[box] for row in _panel_boxes(grid) for box in row]
        if kind == "unlike":
            texts = [panel.tobytes() for panel in panels]
            if len({*texts}) != 2:
                raise Unfit("no two kinds")
            return panels[index_of_best([-texts.count(text) for text in texts])]
        sign = 1 if kind == "fullest" else -1
        return panels[index_of_best([sign * int(np.count_nonzero(panel)) for panel in panels])]

    return {"kind": kind}, solve


@operation("table")
def fill_panels(rng: Random, colours: Sequence[int]) -> Operation:
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
