"""Puzzles of new tasks: the same inputs, outputs that are changed alike, and what the stages do with them."""

import numpy as np
import pytest

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.task_augmentation import MARK, RECOLOURED, augment_tasks
from arc.puzzles.text import format_options
from tests.tiny_models import byte_level_tokenizer

# Every symmetry of a grid, as an index of task_augmentation counts them: transpose, mirror rows, mirror columns.
SYMMETRIES = [
    lambda grid, bits=bits: (grid.T if bits & 1 else grid)[:: -1 if bits & 2 else 1, :: -1 if bits & 4 else 1]
    for bits in range(8)
]


def puzzles(count=200, seed=0, solved=True, colours=10):
    """Puzzles of three demonstrations and two tests; no grid is symmetric, as good as surely."""
    rng = np.random.default_rng(seed)

    def grid():
        return rng.integers(0, colours, size=(4, 5)).astype(np.uint8)

    def puzzle():
        pairs = [{"input": grid(), "output": grid()} for _ in range(5)]
        tests = pairs[3:] if solved else [{"input": pair["input"]} for pair in pairs[3:]]
        return {"train": pairs[:3], "test": tests}

    return ArcDataset({f"p{number:03d}": puzzle() for number in range(count)}, is_orig=True)


def outputs(ds, puzzle):
    """All outputs that are known of a puzzle: of its demonstrations, then its tests."""
    return [pair["output"] for pair in ds.challenge[puzzle]["train"]] + list(ds.solutions.get(puzzle, []))


def inputs(ds, puzzle):
    """All inputs of a puzzle."""
    return [pair["input"] for part in ("train", "test") for pair in ds.challenge[puzzle][part]]


def changes(old, new):
    """Each symmetry that, with a permutation of colours, makes the new grids of the old ones: (bits, colours)."""
    found = []
    for bits, symmetry in enumerate(SYMMETRIES):
        colours = {}
        for before, after in zip(old, new, strict=True):
            turned = symmetry(before)
            if turned.shape != after.shape:
                break
            if any(colours.setdefault(a, b) != b for a, b in zip(turned.flat, after.flat, strict=True)):
                break
        else:
            if len(set(colours.values())) == len(colours):
                found.append((bits, colours))
    return found


def test_inputs_stay_and_all_outputs_change_alike():
    ds = puzzles()
    more = augment_tasks(ds, 1, seed=3)
    assert more.keys[: len(ds.keys)] == ds.keys and len(more.keys) == 2 * len(ds.keys)
    seen, recoloured = set(), 0
    for puzzle in ds.challenge:
        new = f"{puzzle}{MARK}1"
        assert all(map(np.array_equal, inputs(ds, puzzle), inputs(more, new)))
        ((bits, colours),) = changes(outputs(ds, puzzle), outputs(more, new))
        changed = any(a != b for a, b in colours.items())
        assert bits or changed, "a new puzzle has a new rule"
        seen.add(bits)
        recoloured += changed
        assert more.task_of(new) == new
    assert seen == set(range(8))
    assert abs(recoloured / len(ds.challenge) - RECOLOURED) < 0.12  # 3.4 standard deviations of 200 draws


def test_what_was_there_is_as_it_was():
    ds = puzzles(20)
    before = ds.content_hash()
    more = augment_tasks(ds, 2, seed=3)
    assert ds.content_hash() == before == more.change_keys(ds.keys).content_hash()
    assert augment_tasks(ds, 0, seed=3) is ds


def test_no_colour_is_asked_for_that_no_demonstration_shows():
    plain = puzzles(60, colours=4)
    challenge = {}
    for name, puzzle in plain.challenge.items():
        tests = [{"input": q["input"], "output": np.full((2, 3), 9)} for q in puzzle["test"]]
        challenge[name] = {"train": list(puzzle["train"]), "test": tests}
    ds = ArcDataset(challenge, is_orig=True)
    more = augment_tasks(ds, 1, seed=0)
    for puzzle in ds.challenge:
        old, new = outputs(ds, puzzle)[:3], outputs(more, f"{puzzle}{MARK}1")
        assert all((grid == 9).all() for grid in new[3:])
        ((bits, colours),) = changes(old, new[:3])
        assert bits and all(a == b for a, b in colours.items()), "turned only"


def test_every_new_puzzle_is_new():
    grid = np.random.default_rng(0).integers(0, 10, size=(3, 3))
    pairs = [{"input": grid, "output": [[colour]]} for colour in (1, 2, 3)]
    rule = {"train": pairs[:2], "test": [{"input": grid, "output": [[4]]}]}  # nothing to turn, nothing to recolour
    same = {"train": pairs[:2], "test": [{"input": grid, "output": [[2]]}]}  # can be recoloured
    ds = ArcDataset({"rule": rule, "same": same}, is_orig=True)
    more = augment_tasks(ds, 3, seed=0)
    assert not [key for key in more.keys if key.startswith(f"rule{MARK}")]
    names = [name for name in more.challenge if name.startswith("same")]
    found = {tuple(int(grid[0, 0]) for grid in outputs(more, name)) for name in names}
    assert len(names) == len(found) == 4 and all(a != b and b == c for a, b, c in found)


def test_an_id_that_is_there_already():
    ds = ArcDataset({name: puzzles(1).challenge["p000"] for name in ("a", f"a{MARK}1")}, is_orig=True)
    with pytest.raises(ValueError, match=f"puzzle 'a{MARK}1' is there already"):
        augment_tasks(ds, 1, seed=0)


def test_puzzles_without_solutions():
    ds = puzzles(30, solved=False)
    more = augment_tasks(ds, 1, seed=1)
    assert not more.solutions
    for puzzle in ds.challenge:
        assert changes(outputs(ds, puzzle), outputs(more, f"{puzzle}{MARK}1"))


def test_draws_depend_on_the_puzzle_and_the_seed_alone():
    ds = puzzles(12)
    whole, part = augment_tasks(ds, 1, seed=5), augment_tasks(ds.select_puzzles(["p003", "p007"]), 1, seed=5)
    again, other = augment_tasks(ds, 1, seed=5), augment_tasks(ds, 1, seed=6)
    assert whole.content_hash() == again.content_hash() != other.content_hash()
    for puzzle in ("p003", "p007"):
        name = f"{puzzle}{MARK}1"
        assert all(map(np.array_equal, outputs(whole, name), outputs(part, name)))


def test_a_share_of_the_puzzles():
    ds = puzzles(400)
    more = augment_tasks(ds, 1.25, seed=2)
    copies = [key.partition(MARK)[2].partition("_")[0] for key in more.keys if MARK in key]
    assert copies.count("1") == len(ds.keys)
    assert abs(copies.count("2") / len(ds.keys) - 0.25) < 0.08
    with pytest.raises(ValueError, match="expected a number from 0"):
        augment_tasks(ds, -0.5, seed=2)


def test_views_of_new_puzzles_turn_back():
    tokenizer = byte_level_tokenizer()
    ds = augment_tasks(puzzles(8), 1, seed=4)
    views = ds.views(7, tp=True, rt=True, perm=True, shfl_ex=True)
    keys = views.keys(np.zeros(len(ds.keys), dtype=int), np.arange(len(ds.keys)))
    options = format_options(tokenizer.eos_token)
    for key in keys:
        grid, correct, _ = ds.decode(
            ds.fmt_task(key, **options)["reply"], options["lines_sep"], key=key, reply_end=options["reply_end"]
        )
        puzzle, number = ds.get_base_key_and_reply_num(key)
        assert correct and np.array_equal(grid, ds.solutions[puzzle][number])
    samples = TrainingSamples(ds, SampleEncoder(tokenizer, **options), 4096, seed=0, tp="all", rt="all", perm=True)
    assert len(samples) == 8 * len(ds.keys) and {MARK in row["key"] for row in samples} == {True, False}
