"""The puzzles to evaluate, and which of them were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.keys import seeded_rank
from arc.puzzles.leaks import find_leaks
from arc.puzzles.splits import load_dataset, load_split, split_dataset


@dataclass
class Puzzles:
    """The puzzles to evaluate."""

    dataset: ArcDataset  # without augmentation; its keys are the test inputs
    training: ArcDataset | None  # the puzzles that the models were trained on; None: unknown
    source: str  # where the puzzles come from, in words
    leaked: Mapping[str, Sequence[str]] = field(default_factory=dict)  # puzzle -> its names in `training`
    seen_tests: Mapping[str, Sequence[str]] = field(default_factory=dict)  # test input -> puzzles in `training`
    excluded: list[str] = field(default_factory=list)  # puzzles left out for one of these


def load_puzzles(settings: Any) -> Puzzles:
    """Load the puzzles to evaluate, and search for them among the training puzzles.

    Raises:
        ValueError, FileNotFoundError: bad data, nothing is held out, or no puzzle is left.
    """
    if settings.challenges:
        dataset = ArcDataset.load_from_json(settings.challenges)
        if settings.solutions:
            dataset = dataset.load_solutions(settings.solutions)
        training = load_split(settings).train if settings.dataset_dir else None
        source = Path(settings.challenges).name
    else:
        whole = load_dataset(settings)
        split = split_dataset(whole, settings)
        sets = {"examples": [split.seen], "tasks": [split.unseen], "all": [split.seen, split.unseen]}[settings.heldout]
        chosen = [puzzle for held_out in sets for puzzle in held_out.challenge]
        if not chosen:
            flags = "--holdout_examples and --holdout_tasks"
            flags = flags if settings.heldout == "all" else f"--holdout_{settings.heldout}"
            advice = f"evaluate with the same {flags} as the stages were trained with, above 0"
            raise ValueError(f"nothing is held out of {settings.dataset_dir}: {advice}")
        dataset, training = whole.select_puzzles(chosen), split.train
        source = f"{Path(settings.dataset_dir).name}, held out"
        source += "" if settings.heldout == "all" else f" {settings.heldout}"
    if settings.puzzles is not None and settings.puzzles < len(dataset.challenge):
        ranked = sorted(dataset.challenge, key=lambda puzzle: seeded_rank(settings.seed, puzzle))
        dataset = dataset.select_puzzles(ranked[: settings.puzzles])
        source += f", {settings.puzzles} of them"
    puzzles = Puzzles(dataset, training, source)
    if training is not None:
        _look_for_leaks(puzzles, training, settings.exclude_leaked)
    elif settings.exclude_leaked:
        raise ValueError("--exclude_leaked needs --dataset_dir, which names what was trained on")
    if not puzzles.dataset.keys:
        raise ValueError("no puzzle is left to evaluate")
    return puzzles


def _look_for_leaks(puzzles: Puzzles, training: ArcDataset, exclude: bool) -> None:
    leaks = find_leaks(puzzles.dataset, training)
    puzzles.leaked, puzzles.seen_tests = leaks.puzzles, leaks.tests
    print(
        f"leakage: {len(leaks.puzzles)} of {len(puzzles.dataset.challenge)} puzzles were trained on, up to symmetry, "
        f"colours and the order of pairs{_named(leaks.puzzles)}; the pairs of {len(leaks.tests)} of "
        f"{len(puzzles.dataset.keys)} test inputs stand in other training puzzles{_named(leaks.tests)}"
    )
    trained = {*leaks.puzzles, *map(puzzles.dataset.get_base_key, leaks.tests)}
    if exclude and trained:
        puzzles.excluded = sorted(trained)
        puzzles.dataset = puzzles.dataset.select_puzzles(set(puzzles.dataset.challenge) - trained)
        puzzles.leaked, puzzles.seen_tests = {}, {}
        print(f"left out: {len(trained)} puzzles for that")


def _named(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return f" ({', '.join(names[:most])}{', ...' if len(names) > most else ''})" if names else ""
