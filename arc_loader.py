"""Puzzles of the ARC kind: load them, view them, turn them into text, decode answers.

    from arc_loader import ArcDataset, find_leaks, format_options, view_keys

    ds = ArcDataset.load_from_local_json("dataset")          # a folder of JSON files
    ds.keys[:3]                                              # names of puzzles and test inputs
    views = ds.views(seed=42, tp="all", rt="all", perm=True, shfl_ex=True)
    options = format_options("<|eot_id|>")                   # the text format; its end token is the tokenizer's
    key, task = ds.get_task(views.key(epoch=0, index=5), **options)
    print(task["text"])                                      # what a model reads
    grid, correct, info = ds.decode(task["reply"], options["lines_sep"], key=key, reply_end=options["reply_end"])

    split = ds.holdout(examples=64, tasks=4, seed=42)        # split.train, split.seen, split.unseen
    find_leaks(split.unseen, split.train)                    # puzzles that both have, in any symmetry and colours
    view_keys(ds, ds.keys[0], views=16)                      # the views that vote on an answer

A key such as `007bbfb7_0.tp.rt.perm0123456789.ex2-0-1` names a view: puzzle, test index, then transforms in order.
`arc/puzzles/keys.py` explains the grammar. Needs numpy, never torch. The code is in `arc/puzzles/`.
"""

from arc.puzzles.dataset import ArcDataset, Holdout
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.fingerprints import puzzle_fingerprint
from arc.puzzles.keys import COLOURS, View, seeded_rng, shortened_key
from arc.puzzles.leaks import find_leaks
from arc.puzzles.submissions import ATTEMPTS
from arc.puzzles.text import does_not_fit, find_reply_spans, format_options
from arc.puzzles.views import Views, view_keys

__all__ = [
    "ATTEMPTS", "COLOURS", "ArcDataset", "Holdout", "SampleEncoder", "TrainingSamples", "View", "Views",
    "does_not_fit", "find_leaks", "find_reply_spans", "format_options", "puzzle_fingerprint", "seeded_rng",
    "shortened_key", "view_keys",
]  # fmt: skip
