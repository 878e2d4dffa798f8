"""One evaluation: the answers of all models, their scores, and the files of results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arc.decoding.rows import UndecodableModelError
from arc.evaluation import scores
from arc.evaluation.answers import Answer, answer_puzzles, count_rows
from arc.evaluation.progress import Progress, solved_of
from arc.evaluation.puzzles import Puzzles
from arc.evaluation.replies import Replies
from arc.evaluation.report import SCHEMA, write_report
from arc.evaluation.result_cache import UntrustedCacheError, cache_errors, open_cache
from arc.evaluation.selection import RULES, select
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.files import write_atomically
from arc.puzzles.text import cell_accuracy
from arc.runs.artifacts import move_aside, versions
from arc.runs.processes import gather, is_main, leave, share, wait_for_everyone
from arc.runs.settings import user_errors

NOT_THE_RESULT = ("output_dir", "cache_dir", "batch_size")  # settings that do not change the results


def evaluate(models: Sequence[Replies], puzzles: Puzzles, settings: Any) -> dict[str, Any]:
    """Evaluate models one after the other; returns the content of `results.json`, see `write_results`.

    Each of several processes answers its share of the puzzles; all use one cache. The main process gathers all answers;
    the others end here.
    """
    dataset = puzzles.dataset
    entries = {key: _puzzle_entry(puzzles, key) for key in dataset.keys}
    seconds: dict[str, float] = {}
    unanswered: dict[str, list[str]] = {}
    folder = settings.cache_dir or Path(settings.output_dir) / "cache"
    user_kinds = (UntrustedCacheError, UndecodableModelError, BlockingIOError)  # the last: the cache stays locked
    with user_errors(), cache_errors(folder):
        if not is_main():
            wait_for_everyone()  # until the main process has created the cache
        cache = open_cache(folder)
        if is_main():
            wait_for_everyone()
    shard = dataset.select_puzzles(share(list(dataset.challenge)))  # of this process
    with (
        user_errors(user_kinds),
        cache_errors(folder),
        contextlib.closing(cache),
        contextlib.closing(Progress(len(models) * count_rows(shard, settings.views))) as progress,
    ):
        for replies in models:
            replies.open(cache, progress)
            name = replies.evaluated.name
            answers = _answer_all(replies, dataset, shard, settings, entries)
            unanswered[name] = [key for key, answer in answers.items() if not answer.views]
            shortened = sum(answer.shortened for answer in answers.values())
            left_out = sum(answer.left_out for answer in answers.values())
            if unanswered[name] or shortened or left_out:
                unsolved = f"{len(unanswered[name])} test inputs do not fit {replies.context} tokens"
                views = f"{shortened:,} views lost demonstrations, and {left_out:,} did not fit and were left out"
                progress.say(f"{name}: {unsolved} with one demonstration and count as unsolved; {views}")
            seconds[name] = max(gather(replies.seconds))
            replies.close()
    leave()
    names = [replies.evaluated.name for replies in models]
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
        "identities": {replies.evaluated.name: replies.evaluated.identity for replies in models},
        "puzzles": entries,
        "table": scores.score_table(names, entries, seconds),
        "rules": scores.rule_table(names, entries, RULES),
    }


def _puzzle_entry(puzzles: Puzzles, key: str) -> dict[str, Any]:
    # What results.json holds of a test input, without the models' answers.
    view, puzzle = puzzles.dataset[key], puzzles.dataset.get_base_key(key)
    return {
        "puzzle": puzzle,
        "train": [[a.tolist(), b.tolist()] for a, b in view["train"]],
        "input": view["test"].tolist(),
        "solution": None if view["solution"] is None else view["solution"].tolist(),
        "leaked": puzzle in puzzles.leaked,
        "seen_test": key in puzzles.seen_tests,
    }


def _answer_all(
    replies: Replies, dataset: ArcDataset, shard: ArcDataset, settings: Any, entries: dict[str, dict[str, Any]]
) -> dict[str, Answer]:
    # The answers of one model. Each goes into the entries at once; those of other processes follow at the end.
    name, solved, judged = replies.evaluated.name, 0, 0
    replies.progress.describe(name)

    def report(key: str, answer: Answer) -> None:
        nonlocal solved, judged
        entry = entries[key][name] = _judge(answer, dataset[key]["solution"], settings.selection)
        if entry["correct"] is not None:
            solved, judged = solved + any(entry["correct"]), judged + 1
            replies.progress.describe(name, solved, judged)

    try:
        answers = answer_puzzles(replies, shard, settings, report)
    except UndecodableModelError as error:
        # float16 ends at 65504: a model that was trained in bfloat16 or float32 may compute larger numbers.
        advice = "; --dtype bfloat16 or float32 may help" if replies.evaluated.precision.dtype == "float16" else ""
        raise UndecodableModelError(f"{name} cannot be evaluated: {error}{advice}") from None
    together: dict[str, Answer] = {}
    for process_answers, judgements in gather((answers, {key: entries[key][name] for key in shard.keys})):
        together |= process_answers
        for key, entry in judgements.items():
            entries[key][name] = entry
    correct = [entry[name]["correct"] for entry in entries.values() if entry[name]["correct"] is not None]
    if correct:
        replies.progress.say(f"{name}: {solved_of(sum(map(any, correct)), len(correct))}")
    return {key: together[key] for key in dataset.keys}


def _judge(answer: Answer, solution: np.ndarray | None, rule: str) -> dict[str, Any]:
    # What results.json holds of a model's answer.
    by_rule = {name: select(answer.candidates, name, scores.GUESSES) for name in RULES}
    guesses = by_rule[rule]
    first = guesses[0] if guesses else None
    known = solution is not None

    def is_right(grid: np.ndarray | None) -> bool:
        return grid is not None and solution is not None and np.array_equal(grid, solution)

    def probability(log_prob: float | None) -> float:
        return 0.0 if log_prob is None else math.exp(log_prob)

    return {
        "guesses": [grid.tolist() for grid in guesses],
        "correct": [is_right(grid) for grid in guesses] if known else None,
        "greedy": None if answer.greedy is None else answer.greedy.tolist(),
        "greedy_correct": is_right(answer.greedy) if known else None,
        "decodable": answer.greedy is not None,
        "candidates": len(answer.candidates),
        "found": any(is_right(candidate.grid) for candidate in answer.candidates) if known else None,
        "right_shape": None if solution is None else first is not None and first.shape == solution.shape,
        "cell_accuracy": None if solution is None else cell_accuracy(first, solution),
        "prob_truth": probability(answer.truth) if known else None,
        "prob_greedy": probability(answer.greedy_log_prob),
        "rules": {name: [is_right(grid) for grid in grids] for name, grids in by_rule.items()} if known else None,
        "views": answer.views,
    }


def write_results(results: dict[str, Any], dataset: ArcDataset, folder: str | Path) -> list[Path]:
    """Write `results.json`, `submission-MODEL.json` of each model, and `report.html`; returns their paths.

    results.json holds schema, settings, versions and data, and
    - "models": the names;
    - "puzzles": for each test input {"puzzle", "train", "input", "solution", "leaked", "seen_test", MODEL: {"guesses":
      up to two grids, best first, "correct": which of them are right, "greedy", "greedy_correct", "decodable",
      "candidates", "found", "right_shape", "cell_accuracy", "prob_truth", "prob_greedy", "rules", "views"}};
    - "table": see `scores.score_table`; "rules": see `scores.rule_table`.
    A grid is a list of rows. Figures that need a solution are null where there is none.

    Files of another evaluation in the folder are moved aside first. `dataset` has the puzzles as they were loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_another(folder / "results.json", results):
        old = [folder / "results.json", folder / "report.html", *sorted(folder.glob("submission-*.json"))]
        for path in (path for path in old if path.exists()):
            move_aside(path)
    written = []
    for name in results["models"]:
        guesses: dict[str, list[Any]] = {p: [[] for _ in v["test"]] for p, v in dataset.challenge.items()}
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
    # Whether the file holds results of other models or puzzles, or with other settings.
    if not path.exists():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return any(before[name] != json.loads(json.dumps(results[name])) for name in ("settings", "identities", "data"))
    except (ValueError, KeyError, TypeError):
        return True
