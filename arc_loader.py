"""Puzzles of the ARC kind: load them, view them, turn them into text, decode answers.

    from arc_loader import ArcDataset, format_options

    ds = ArcDataset.load_from_local_json("dataset")          # a folder of JSON files
    ds.keys[:3]                                              # what it holds
    views = ds.views(seed=42, tp="all", rt="all", perm=True, shfl_ex=True)
    key, task = ds.get_task(views.key(epoch=0, index=5), **format_options("<|eot_id|>"))
    print(task["text"])                                      # what a model reads
    grid, correct, info = ds.decode(task["reply"], lines_sep="\\n", key=key)

A key such as `007bbfb7_0.tp.rt.perm0123456789.ex2-0-1` names a view: puzzle, test index, then transforms in order.
`arc/puzzles/keys.py` explains the grammar. Needs numpy, never torch. The code is in `arc/puzzles/`.
"""

from arc.puzzles.dataset import ArcDataset, Holdout
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.leaks import find_leaks, puzzle_fingerprint
from arc.puzzles.text import format_options

__all__ = ["ArcDataset", "Holdout", "SampleEncoder", "find_leaks", "format_options", "puzzle_fingerprint"]
