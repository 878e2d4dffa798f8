"""One evaluation: which puzzles, what all models answer, how that is judged, and the files that tell of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arc.decoding.rows import UndecodableModelError
from arc.evaluation import scores
from arc.evaluation.answers import Answer, EvaluatedModel, Replies, answer_puzzles, progress
from arc.evaluation.result_cache import UntrustedCacheError, cache_errors, open_cache
from arc.evaluation.selection import RULES, select
from arc.puzzles import text as text_module
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.files import write_atomically
from arc.puzzles.leaks import find_leaks
from arc.puzzles.splits import load_dataset, load_split, split_dataset
from arc.runs.artifacts import move_aside, versions
from arc.runs.processes import gather, is_main, leave, share, wait_for_everyone
from arc.runs.settings import user_errors

SCHEMA = 2  # of results.json
NOT_THE_RESULT = ("output_dir", "cache_dir", "batch_size")  # settings that say where and how, not what comes out


# ---------------------------------------------------------------------------------------------------------------------
# Puzzles


@dataclass
class Puzzles:
    """What is evaluated.

    Args:
        dataset: an original dataset, its keys test inputs.
        training: what the models were trained on, if that is known.
        source: where the puzzles are from, in words.
        leaked: puzzles of the dataset that equal ones in `training` -> those there.
        seen_tests: test inputs whose pair stands in puzzles of `training` -> those there.
        excluded: puzzles that were left out for either.
    """

    dataset: ArcDataset
    training: ArcDataset | None
    source: str
    leaked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seen_tests: Mapping[str, Sequence[str]] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)


def load_puzzles(settings: Any) -> Puzzles:
    """Load what is to be evaluated and look for it in what was trained on.

    Args:
        settings: of evaluate_arc.py.

    Raises:
        ValueError, FileNotFoundError: bad data, nothing held out, or nothing left.
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
        parts = {"examples": [split.seen], "tasks": [split.unseen], "all": [split.seen, split.unseen]}[settings.heldout]
        chosen = [puzzle for part in parts for puzzle in part.challenge]
        if not chosen:
            what = {"examples": "--holdout_examples", "tasks": "--holdout_tasks"}.get(settings.heldout)
            raise ValueError(
                f"nothing is held out of {settings.dataset_dir}: evaluate with the same "
                f"{what or '--holdout_examples and --holdout_tasks'} as the stages were trained with, above 0"
            )
        dataset, training = whole.select_puzzles(chosen), split.train
        source = f"{Path(settings.dataset_dir).name}, held out" + (
            "" if settings.heldout == "all" else f" {settings.heldout}"
        )
    if settings.puzzles is not None and settings.puzzles < len(dataset.challenge):
        ranked = sorted(dataset.challenge, key=lambda p: hashlib.sha256(f"{settings.seed}:{p}".encode()).digest())
        dataset = dataset.select_puzzles(ranked[: settings.puzzles])
        source += f", {settings.puzzles} of them"
    puzzles = Puzzles(dataset, training, source)
    if training is not None:
        _look_for_leaks(puzzles, settings.exclude_leaked)
    elif settings.exclude_leaked:
        raise ValueError("--exclude_leaked needs --dataset_dir, which names what was trained on")
    if not puzzles.dataset.keys:
        raise ValueError("no puzzle is left to evaluate")
    return puzzles


def _look_for_leaks(puzzles: Puzzles, exclude: bool) -> None:
    leaks = find_leaks(puzzles.dataset, puzzles.training)
    puzzles.leaked, puzzles.seen_tests = leaks.puzzles, leaks.tests
    print(
        f"leakage: {len(leaks.puzzles)} of {len(puzzles.dataset.challenge)} puzzles were trained on, up to symmetry, "
        f"colours and the order of pairs{_named(leaks.puzzles)}; the pairs of {len(leaks.tests)} of "
        f"{len(puzzles.dataset.keys)} test inputs stand in other training puzzles{_named(leaks.tests)}"
    )
    known = {*leaks.puzzles, *map(puzzles.dataset.get_base_key, leaks.tests)}
    if exclude and known:
        puzzles.excluded = sorted(known)
        puzzles.dataset = puzzles.dataset.select_puzzles(set(puzzles.dataset.challenge) - known)
        puzzles.leaked, puzzles.seen_tests = {}, {}
        print(f"left out: {len(known)} puzzles for that")


def _named(found: Sequence[str], most: int = 5) -> str:
    return f" ({', '.join(list(found)[:most])}{', ...' if len(found) > most else ''})" if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation


def evaluate(models: Sequence[Replies], puzzles: Puzzles, settings: Any) -> dict[str, Any]:
    """Evaluate models one after the other.

    Of processes that work together each answers its own share, and all replies go into one cache; the main process
    gets all answers, and the others end here.

    Args:
        models: what each of them replies; its cache is opened here.
        puzzles: see `load_puzzles`.
        settings: of evaluate_arc.py.

    Returns:
        What `results.json` holds; see `write_results`.
    """
    dataset = puzzles.dataset
    entries: dict[str, dict[str, Any]] = {}
    for key in dataset.keys:
        view = dataset[key]
        puzzle = dataset.get_base_key(key)
        entries[key] = {
            "puzzle": puzzle,
            "train": [[a.tolist(), b.tolist()] for a, b in view["train"]],
            "input": view["test"].tolist(),
            "solution": None if view["solution"] is None else view["solution"].tolist(),
            "leaked": puzzle in puzzles.leaked,
            "seen_test": key in puzzles.seen_tests,
        }
    seconds = {}
    unanswered: dict[str, list[str]] = {}
    folder = settings.cache_dir or Path(settings.output_dir) / "cache"
    kinds = (UntrustedCacheError, UndecodableModelError, BlockingIOError)  # the last: another process has the cache
    with user_errors(), cache_errors(folder):
        if not is_main():
            wait_for_everyone()  # one process makes the cache, then all use it
        cache = open_cache(folder)
        if is_main():
            wait_for_everyone()
    with user_errors(kinds), cache_errors(folder), contextlib.closing(cache):
        for replies in models:
            replies.use_cache(cache)
            name = replies.evaluated.name
            try:
                answers = _answer_all(replies, dataset, settings, entries)
            except UndecodableModelError as error:
                raise UndecodableModelError(
                    f"{name} cannot be evaluated: {error}{_advice(replies.evaluated)}"
                ) from None
            unanswered[name] = [key for key, answer in answers.items() if not answer.views]
            shortened = sum(answer.shortened for answer in answers.values())
            left_out = sum(answer.left_out for answer in answers.values())
            if unanswered[name] or shortened or left_out:
                print(
                    f"{name}: {len(unanswered[name])} test inputs do not fit {replies.context} tokens with one "
                    f"demonstration and count as unsolved; {shortened:,} views lost demonstrations, and {left_out:,} "
                    "did not fit and were left out"
                )
            seconds[name] = max(gather(replies.seconds))
            replies.close()
    leave()
    evaluated = [replies.evaluated for replies in models]
    names = [model.name for model in evaluated]
    return {
        "schema": SCHEMA,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_THE_RESULT},
        "versions": versions(),
        "data": {
            "source": puzzles.source,
            "fingerprint": dataset.content_hash(),
            "puzzles": len(dataset.challenge),
            "test_inputs": len(dataset.keys),
            "leakage_checked": puzzles.training is not None,
            "leaked": puzzles.leaked,
            "seen_tests": puzzles.seen_tests,
            "excluded": puzzles.excluded,
            "unanswerable": unanswered,
        },
        "models": names,
        "identities": {model.name: model.identity for model in evaluated},
        "puzzles": entries,
        "table": scores.score_table(names, entries, seconds),
        "rules": scores.rule_table(names, entries, RULES),
    }


def _advice(model: EvaluatedModel) -> str:
    # float16 ends at 65504: what a model computed in bfloat16 or float32 may be beyond that.
    return "; --dtype bfloat16 or float32 may help" if model.precision.dtype == "float16" else ""


def _answer_all(
    replies: Replies, dataset: ArcDataset, settings: Any, entries: dict[str, dict[str, Any]]
) -> dict[str, Answer]:
    # The answers of one model, judged into the entries as they come. Those of other processes come at the end.
    name, solved, judged = replies.evaluated.name, 0, 0
    own = dataset.select_puzzles(share(list(dataset.challenge)))
    with progress(name, len(own.keys)) as bar:

        def report(key: str, answer: Answer) -> None:
            nonlocal solved, judged
            entry = entries[key][name] = _judge(answer, dataset[key]["solution"], settings.selection)
            if entry["correct"] is not None:
                solved, judged = solved + any(entry["correct"]), judged + 1
                bar.set_postfix_str(f"solved {solved} of {judged} ({solved / judged:.1%})", refresh=False)
            bar.update()

        answers = answer_puzzles(replies, own, settings, report)
    together: dict[str, Answer] = {}
    for part in gather((answers, {key: entries[key][name] for key in own.keys})):
        together |= part[0]
        for key, entry in part[1].items():
            entries[key][name] = entry
    return {key: together[key] for key in dataset.keys}


def _judge(answer: Answer, solution: np.ndarray | None, rule: str) -> dict[str, Any]:
    # An entry of results.json.
    by_rule = {name: select(answer.candidates, name, scores.GUESSES) for name in RULES}
    guesses = by_rule[rule]
    entry: dict[str, Any] = {
        "guesses": [grid.tolist() for grid in guesses],
        "correct": None,
        "greedy": None if answer.greedy is None else answer.greedy.tolist(),
        "greedy_correct": None,
        "decodable": answer.greedy is not None,
        "candidates": len(answer.candidates),
        "found": None,
        "right_shape": None,
        "cell_accuracy": None,
        "prob_truth": None,
        "prob_greedy": 0.0 if answer.greedy_log_prob is None else math.exp(answer.greedy_log_prob),
        "rules": None,
        "views": answer.views,
    }
    if solution is None:
        return entry

    def is_right(grid: np.ndarray | None) -> bool:
        return grid is not None and np.array_equal(grid, solution)

    first = guesses[0] if guesses else None
    return entry | {
        "correct": [is_right(grid) for grid in guesses],
        "greedy_correct": is_right(answer.greedy),
        "found": any(is_right(candidate.grid) for candidate in answer.candidates),
        "right_shape": first is not None and first.shape == solution.shape,
        "cell_accuracy": text_module.cell_accuracy(first, solution),
        "prob_truth": 0.0 if answer.truth is None else math.exp(answer.truth),
        "rules": {name: [is_right(grid) for grid in grids] for name, grids in by_rule.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_results(results: dict[str, Any], dataset: ArcDataset, folder: str | Path) -> list[Path]:
    """Write `results.json`, `submission-MODEL.json` of each model, and `report.html`.

    results.json holds, next to schema, settings, versions and data: "models", the names; "puzzles", for each test input
    {"puzzle", "train", "input", "solution", "leaked", "seen_test", MODEL: {"guesses": up to two grids, best first,
    "correct": which of them are right, "greedy", "greedy_correct", "decodable", "candidates", "found", "right_shape",
    "cell_accuracy", "prob_truth", "prob_greedy", "rules", "views"}}; "table", see scores.score_table; "rules",
    see scores.rule_table.
    Grids are lists of rows; what needs a solution is null where there is none.

    A results.json of another evaluation is moved aside first, with its submissions and report.

    Args:
        results: see `evaluate`.
        dataset: the puzzles, as they were loaded.
        folder: where to.
    """
    from arc.evaluation.report import write_report

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_another(folder / "results.json", results):
        old = [folder / "results.json", folder / "report.html", *sorted(folder.glob("submission-*.json"))]
        for path in (path for path in old if path.exists()):
            move_aside(path)
    written = []
    for name in results["models"]:
        guesses: dict[str, list[list[dict[str, Any]]]] = {
            p: [[] for _ in v["test"]] for p, v in dataset.challenge.items()
        }
        for key, entry in results["puzzles"].items():
            puzzle, number = dataset.get_base_key_and_reply_num(key)
            guesses[puzzle][number] = [{"output": grid} for grid in entry[name]["guesses"]]
        written.append(folder / f"submission-{name}.json")
        write_atomically(written[-1], json.dumps(dataset.get_submission(guesses)))
    written += [folder / "results.json", folder / "report.html"]
    write_atomically(written[-2], json.dumps(results, separators=(",", ":"), allow_nan=False) + "\n")
    write_report(results, written[-1])
    return written


def _is_another(path: Path, results: dict[str, Any]) -> bool:
    # Whether an evaluation of something else, or by other settings, stands there.
    if not path.exists():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return any(before[name] != json.loads(json.dumps(results[name])) for name in ("settings", "identities", "data"))
    except (ValueError, KeyError, TypeError):
        return True


def print_tables(results: dict[str, Any]) -> None:
    """Print both tables of the results, narrow enough for four models in a terminal of 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def make(title: str) -> Table:
        table = Table(title=title, caption=f"models: {prefix}..." if prefix else None, box=box.SIMPLE_HEAD)
        table.pad_edge = table.show_edge = False
        table.add_column("", no_wrap=True)
        for name in results["models"]:
            table.add_column(name[len(prefix) :], justify="right", overflow="fold")
        return table

    prefix = _shared_prefix(results["models"])
    rows, n = results["table"], results["data"]["test_inputs"]
    known = rows[0]["n"]
    judged = f"{n:,} test inputs" if known in (0, n) else f"{known:,} of {n:,} test inputs, those with a solution"
    table = make(f"{results['data']['source']}: {judged}, with 95% intervals")
    for name, title in TITLES.items():
        table.add_row(title, *(_share(row[name], row[f"{name}_interval"]) for row in rows))
    changes = ("-" if r["change"] is None else _share(r["change"], r["change_interval"], "+.1%") for r in rows)
    table.add_row("change, two guesses", *changes)
    table.add_row("gained, lost", *("-" if r["gained"] is None else _gains(r) for r in rows))
    table.add_row("seconds", *(f"{row['seconds']:,.1f}" for row in rows))
    rules = make("selection rules: one guess, two guesses")
    rules.add_row("truth found", *(_share(row["found"]) for row in results["rules"]))
    for rule in RULES:
        shares = ((_share(row[rule]["exact_1"]), _share(row[rule]["exact_2"])) for row in results["rules"])
        rules.add_row(rule, *(", ".join(pair) for pair in shares))
    # Names are text, whatever brackets and colons they hold.
    console = Console(markup=False, emoji=False, highlight=False)
    for one in (table, rules):
        console.print()
        console.print(one)
    console.print()


def _shared_prefix(names: Sequence[str]) -> str:
    # What all names begin with, up to a hyphen: "Llama-3.2-1B-" of the pipeline's own.
    if len(names) < 2:
        return ""
    return os.path.commonprefix(list(names)).rpartition("-")[0] + "-" if "-" in os.path.commonprefix(names) else ""


def _gains(row: dict[str, Any]) -> str:
    return f"{len(row['gained'])}, {len(row['lost'])}"


TITLES = {
    "exact_1": "exact, one guess",
    "exact_2": "exact, two guesses",
    "score": "puzzles (score)",
    "greedy": "exact, greedy",
    "decodable": "greedy is a grid",
    "right_shape": "right shape",
    "cell_accuracy": "right cells",
    "prob_truth": "P(truth)",
    "prob_greedy": "P(greedy)",
    "found": "truth found",
}


def _share(value: float | None, interval: Sequence[float] | None = None, form: str = ".1%") -> str:
    if value is None:
        return "-"
    bounds = "" if interval is None else f"\n{100 * interval[0]:.1f}..{100 * interval[1]:.1f}"
    return f"{value:{form}}{bounds}"
