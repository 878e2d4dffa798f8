"""Scores of an evaluation: shares of solved test inputs, intervals, and changes from one model to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

GUESSES = 2  # of each test input, as in the competition
RESAMPLES = 4000
SHARES = ("exact_1", "exact_2", "greedy", "decodable", "right_shape", "found")  # of the test inputs
MEANS = ("cell_accuracy", "prob_truth", "prob_greedy")  # of numbers between 0 and 1


def wilson_interval(count: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share: `count` successes in n independent trials; z: quantile of the normal distribution.

    Source: Wilson 1927. Unlike the normal approximation it is right near 0 and 1.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = count / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> list[float]:
    """95% interval of a mean by resampling groups, because test inputs of one puzzle are not independent.

    `groups` names the group of each value; None: each value is a group.
    """
    if not len(values):
        return [0.0, 1.0]
    _, member = np.unique(np.asarray(range(len(values)) if groups is None else groups), return_inverse=True)
    sums, counts = np.bincount(member, np.asarray(values, dtype=float)), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, RESAMPLES, 100):  # all at once, thousands of puzzles would take a gigabyte
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=100)
        means.append((drawn @ sums) / (drawn @ counts))
    return [float(bound) for bound in np.percentile(np.concatenate(means), [2.5, 97.5])]


def mean_interval(values: Sequence[float], groups: Sequence[str], least: float = 0.0) -> list[float]:
    """95% interval of a mean by `bootstrap_interval`, with a margin where all values are equal.

    Resampling equal values gives a width of 0. The margin is Wilson's bound for no success in as many trials as there
    are groups. Values range from `least` to 1.
    """
    low, high = bootstrap_interval(values, groups)
    if low == high:
        margin = wilson_interval(0, len(set(groups)))[1]
        low, high = max(least, low - margin), min(1.0, high + margin)
    return [low, high]


def score_table(models: Sequence[str], puzzles: dict[str, dict[str, Any]], seconds: dict[str, float]) -> list[dict]:
    """The scores of each model over all test inputs that have a solution.

    Args:
        models: names, in the order of the columns.
        puzzles: test input -> its entry in `results.json` (see `results.write_results`).
        seconds: of each model's evaluation.

    Returns:
        For each model a dict: model, n (test inputs with a solution), puzzles (number of their puzzles), each of
        SHARES, score, and each of MEANS with NAME_interval (95%), and seconds. A comparison with the model before has
        gained (test inputs that only this model solves with two guesses), lost (only the one before), change (of
        exact_2), change_interval; None for the first model. Without solutions all scores are None.
    """
    known = {key: entry for key, entry in puzzles.items() if entry["solution"] is not None}
    puzzle_of = [entry["puzzle"] for entry in known.values()]
    table: list[dict[str, Any]] = []
    before: dict[str, bool] | None = None
    for model in models:
        answers = {key: entry[model] for key, entry in known.items()}
        solved = {key: any(answer["correct"]) for key, answer in answers.items()}
        values: dict[str, list[Any]] = {
            "exact_1": [answer["correct"][:1] == [True] for answer in answers.values()],
            "exact_2": list(solved.values()),
            "greedy": [bool(answer["greedy_correct"]) for answer in answers.values()],
        }
        for name in (*SHARES[3:], *MEANS):
            values[name] = [answer[name] for answer in answers.values()]
        row: dict[str, Any] = {"model": model, "n": len(known), "puzzles": len(set(puzzle_of))}
        for name in SHARES:
            row |= _measured(name, values[name])
        # The competition's score: of each puzzle the share of its test inputs that a guess solves.
        shares: dict[str, list[bool]] = {}
        for puzzle, is_solved in zip(puzzle_of, values["exact_2"], strict=True):
            shares.setdefault(puzzle, []).append(is_solved)
        # Wilson's interval is for 0 and 1. It is wide enough here: shares between them vary less.
        row |= _measured("score", [float(np.mean(share)) for share in shares.values()])
        for name in MEANS:
            row |= _measured(name, values[name], puzzle_of)
        row |= {"gained": None, "lost": None, "change": None, "change_interval": None}
        if before is not None and known:
            differences = [float(solved[key]) - float(before[key]) for key in known]
            row["gained"] = [key for key in known if solved[key] and not before[key]]
            row["lost"] = [key for key in known if before[key] and not solved[key]]
            row["change"] = float(np.mean(differences))
            row["change_interval"] = mean_interval(differences, puzzle_of, least=-1.0)
        row["seconds"] = round(seconds.get(model, 0.0), 1)
        table.append(row)
        before = solved
    return table


def _measured(name: str, values: Sequence[Any], groups: Sequence[str] | None = None) -> dict[str, Any]:
    # A mean with its interval: of a share by Wilson, of other numbers by resampling groups.
    if not len(values):
        return {name: None, f"{name}_interval": None}
    if groups is None:
        bounds = [*wilson_interval(float(np.sum(values)), len(values))]
    else:
        bounds = mean_interval(values, groups)
    return {name: float(np.mean(values)), f"{name}_interval": bounds}


def rule_table(models: Sequence[str], puzzles: dict[str, dict[str, Any]], rules: Sequence[str]) -> list[dict[str, Any]]:
    """The score of each selection rule, and how often the solution was among the candidates.

    An answer's "rules" says for each rule which of its guesses are right.

    Returns:
        For each model a dict: model, n, found, and for each rule {"exact_1", "exact_2"}; None without solutions.
    """
    known = [entry for entry in puzzles.values() if entry["solution"] is not None]

    def mean(values: list[bool]) -> float | None:
        return float(np.mean(values)) if values else None

    table = []
    for model in models:
        row: dict[str, Any] = {"model": model, "n": len(known)}
        row["found"] = mean([entry[model]["found"] for entry in known])
        for rule in rules:
            correct = [entry[model]["rules"][rule] for entry in known]
            firsts, either = [c[:1] == [True] for c in correct], [any(c) for c in correct]
            row[rule] = {"exact_1": mean(firsts), "exact_2": mean(either)}
        table.append(row)
    return table
