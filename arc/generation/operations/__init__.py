"""All operations of programs, by subject.

They are about what ARC's puzzles are said to be about: objects, counting, symmetry, lines, inside and outside (Chollet
2019, https://arxiv.org/abs/1911.01547, "core knowledge"). The files from `lines` on add what was lacking of the 16
groups of concepts that ConceptARC lists (Moskvichev, Odouard and Mitchell 2023, https://arxiv.org/abs/2305.07141):
above and below, centre, clean up, complete a shape, copy, count, extend to a boundary, extract, filled or not,
horizontal and vertical, inside and outside, move to a boundary, order, same and different, what is on top in two and in
three dimensions. Its list was read, not its tasks; no operation is made after a task.

To add one: write a function that draws its parameters and returns them with what it does to a grid, and register it
with @operation and the scenes that it suits (`objects.outline` is short).
"""

from arc.generation.operations import (
    arrangements,
    cells,
    frames,
    grids,
    layers,
    lines,
    marks,
    objects,
    panels,
    tables,
)
from arc.generation.rules import Operations

# A seed draws positions in this order: put a new file at the end, and a new operation at the end of the last file.
FILES = (objects, cells, grids, panels, lines, arrangements, frames, layers, tables, marks)
OPERATIONS: Operations = {name: entry for file in FILES for name, entry in file.OPERATIONS.items()}
