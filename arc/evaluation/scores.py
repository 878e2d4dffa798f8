"""Scores of an evaluation: what share is solved, how sure that is, and what a model gained on the one before it.

Pure functions of grids and numbers; no model is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

GUESSES = 2  # of each test input, as in the competition
RESAMPLES = 4000
# Shares of the test inputs that are true, and means of numbers between 0 and 1.
SHARES = ("exact_1", "exact_2", "greedy", "decodable", "right_shape", "found")
MEANS = ("score", "cell_accuracy", "prob_truth", "prob_greedy")


def wilson_interval(count: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share of independent trials.

    Args:
        count: how many are true.
        n: trials.
        z: quantile of the normal distribution.

    Source: Wilson 1927; unlike the normal approximation right near 0 and 1.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = count / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> list[float]:
    """95% interval of a mean by resampling groups: test inputs of one puzzle are not independent.

    Args:
        values: numbers, (n,).
        groups: what each belongs to; None: each stands alone.
        seed: of the draws.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return [0.0, 1.0]
    _, member = np.unique(np.asarray(range(len(values)) if groups is None else groups), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, RESAMPLES, 100):  # all at once, thousands of puzzles would take a gigabyte
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=100)
        means.append((drawn @ sums) / (drawn @ counts))
    return [float(bound) for bound in np.percentile(np.concatenate(means), [2.5, 97.5])]


def mean_interval(values: Sequence[float], groups: Sequence[str], least: float = 0.0) -> list[float]:
    """95% interval of a mean, by `bootstrap_interval`; where values do not vary, by how often they can have varied.

    Resampling values that are all equal would find an interval without width, as if nothing could be otherwise.

    Args:
        values: numbers from `least` to 1, (n,).
        groups: what each belongs to.
        least: the least that a value can be.
    """
    low, high = bootstrap_interval(values, groups)
    if low == high:
        margin = wilson_interval(0, len(set(groups)))[1]
        low, high = max(least, low - margin), min(1.0, high + margin)
    return [low, high]


def score_table(models: Sequence[str], puzzles: dict[str, dict[str, Any]], seconds: dict[str, float]) -> list[dict]:
    """The table of an evaluation: for each model its scores over all test inputs that have a solution.

    Args:
        models: names, in the order of the columns.
        puzzles: test input -> what `results.json` holds of it (see evaluation_tools.write_results).
        seconds: of each model's evaluation.

    Returns:
        For each model a dict: model, n (test inputs with a solution), puzzles (that these
        belong to), each of SHARES and MEANS with NAME_interval (95%),
        gained and lost (test inputs that two guesses solve now and not in the column before, and the other way round;
        None for the first), change of exact_2 and change_interval, seconds. Without solutions all scores are None.
    """
    known = {key: entry for key, entry in puzzles.items() if entry["solution"] is not None}
    parts = [entry["puzzle"] for entry in known.values()]
    table: list[dict[str, Any]] = []
    before: dict[str, bool] | None = None
    for model in models:
        answers = {key: entry[model] for key, entry in known.items()}
        solved = {key: any(answer["correct"]) for key, answer in answers.items()}
        values = {
            "exact_1": [bool(answer["correct"][:1] == [True]) for answer in answers.values()],
            "exact_2": list(solved.values()),
            "greedy": [bool(answer["greedy_correct"]) for answer in answers.values()],
            "decodable": [answer["decodable"] for answer in answers.values()],
            "right_shape": [answer["right_shape"] for answer in answers.values()],
            "found": [answer["found"] for answer in answers.values()],
            "cell_accuracy": [answer["cell_accuracy"] for answer in answers.values()],
            "prob_truth": [answer["prob_truth"] for answer in answers.values()],
            "prob_greedy": [answer["prob_greedy"] for answer in answers.values()],
        }
        row: dict[str, Any] = {"model": model, "n": len(known), "puzzles": len(set(parts))}
        for name in SHARES:
            row |= _measured(name, values[name], _share_interval)
        # The competition counts puzzles: of each the share of its test inputs that a guess solves.
        shares: dict[str, list[bool]] = {}
        for puzzle, is_solved in zip(parts, values["exact_2"], strict=True):
            shares.setdefault(puzzle, []).append(is_solved)
        # Wilson's interval, of shares that are between 0 and 1 too: wide enough, since such vary less than 0 and 1 do.
        row |= _measured("score", [float(np.mean(share)) for share in shares.values()], _share_interval)
        for name in ("cell_accuracy", "prob_truth", "prob_greedy"):
            row |= _measured(name, values[name], lambda v: mean_interval(v, parts))
        row |= {"gained": None, "lost": None, "change": None, "change_interval": None}
        if before is not None and known:
            differences = [float(solved[key]) - float(before[key]) for key in known]
            row["gained"] = [key for key in known if solved[key] and not before[key]]
            row["lost"] = [key for key in known if before[key] and not solved[key]]
            row["change"] = float(np.mean(differences))
            row["change_interval"] = mean_interval(differences, parts, least=-1.0)
        row["seconds"] = round(seconds.get(model, 0.0), 1)
        table.append(row)
        before = solved
    return table


def _share_interval(values: Sequence[Any]) -> tuple[float, float]:
    return wilson_interval(float(np.sum(values)), len(values))


def _measured(name: str, values: Sequence[Any], interval: Any) -> dict[str, Any]:
    if not len(values):
        return {name: None, f"{name}_interval": None}
    return {name: float(np.mean(values)), f"{name}_interval": [float(bound) for bound in interval(values)]}


def rule_table(models: Sequence[str], puzzles: dict[str, dict[str, Any]], rules: Sequence[str]) -> list[dict[str, Any]]:
    """What each selection rule would have scored, and how often the solution was among the candidates at all.

    Args:
        models, puzzles: see `score_table`; each answer's "rules" holds, for each rule, which of its guesses are right.
        rules: their names.

    Returns:
        For each model a dict: model, n, found, and for each rule {"exact_1", "exact_2"}; None without solutions.
    """
    known = [entry for entry in puzzles.values() if entry["solution"] is not None]
    table = []
    for model in models:
        row: dict[str, Any] = {"model": model, "n": len(known)}
        row["found"] = float(np.mean([entry[model]["found"] for entry in known])) if known else None
        for rule in rules:
            correct = [entry[model]["rules"][rule] for entry in known]
            row[rule] = {
                "exact_1": float(np.mean([c[:1] == [True] for c in correct])) if known else None,
                "exact_2": float(np.mean([any(c) for c in correct])) if known else None,
            }
        table.append(row)
    return table
