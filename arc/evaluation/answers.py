"""The answers of a model to test inputs: candidate grids from all views, scored under all views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arc.decoding.rows import Reply
from arc.evaluation.replies import Replies, token_hash
from arc.evaluation.selection import Candidate, gather_candidates
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.keys import transform_grid
from arc.puzzles.views import view_keys

CHUNK = 8  # batches of views that are worked on together; the last batch of a chunk may not be full


@dataclass
class Answer:
    """A model's answer to one test input."""

    views: int = 0  # that fit the context; 0: not even the first one, so there is no answer
    shortened: int = 0  # views that lost demonstrations to fit
    left_out: int = 0  # views that do not fit with one demonstration; 0 where the first one does not
    greedy: np.ndarray | None = None  # grid of the greedy reply to the first view; None: the reply is no grid
    greedy_log_prob: float | None = None  # of that reply; None: there is none
    candidates: list[Candidate] = field(default_factory=list)  # different grids, scored under all views
    truth: float | None = None  # log probability of the solution in the first view; None: unknown


class _View(NamedTuple):
    key: str  # after demonstrations were dropped to fit
    prompt: np.ndarray
    guess: np.ndarray  # the test input as a reply: many solutions look like it


def count_rows(dataset: ArcDataset, views: int) -> int:
    """Rows that one model decodes and scores: the total of the progress bar."""
    return sum(_rows_of(dataset, key, views) for key in dataset.keys)


def _rows_of(dataset: ArcDataset, key: str, views: int) -> int:
    # A first guess; each view decoded and scored; the solution scored.
    return 1 + 2 * views + (dataset[key]["solution"] is not None)


def answer_puzzles(
    replies: Replies, dataset: ArcDataset, settings: Any, report: Callable[[str, Answer], None]
) -> dict[str, Answer]:
    """Answers of one model to all test inputs; `report` is called with each.

    First come the greedy replies to the first views: guesses that make the search of the other views faster. Then,
    chunk by chunk, come candidates from all views and their scores under all views.
    """
    views: dict[str, list[_View]] = {}
    answers: dict[str, Answer] = {}
    for key in dataset.keys:
        views[key], shortened = _fitting_views(replies, dataset, key, settings)
        count = len(views[key])
        answers[key] = Answer(count, shortened, settings.views - count if count else 0)
        unused_rows = 2 * (settings.views - count) if count else _rows_of(dataset, key, settings.views)
        replies.progress.skipped(unused_rows)
    answered = [key for key in dataset.keys if views[key]]
    prompts = (view.prompt for key in answered for view in views[key])
    replies.longest = max(map(len, prompts), default=0) + replies.max_new_tokens
    first_views = [views[key][0] for key in answered]
    first_replies = replies.greedy([view.prompt for view in first_views], [view.guess for view in first_views])
    greedy = dict(zip(answered, first_replies, strict=True))
    for key in set(dataset.keys) - set(answered):
        report(key, answers[key])
    size = max(1, CHUNK * replies.batch_size // settings.views)
    for begin in range(0, len(answered), size):
        chunk = answered[begin : begin + size]
        _answer_chunk(replies, dataset, settings, {key: views[key] for key in chunk}, greedy, answers)
        for key in chunk:
            report(key, answers[key])
    return answers


def _fitting_views(replies: Replies, dataset: ArcDataset, key: str, settings: Any) -> tuple[list[_View], int]:
    # The views that fit, none if the first one does not, and how many of them lost demonstrations.
    views, shortened = [], 0
    for number, view in enumerate(view_keys(dataset, key, settings.views, settings.seed, settings.keep_background)):
        try:
            [row] = replies.encoder.encode(dataset, [view], max_tokens=replies.prompt_tokens, reply=False)
        except ValueError:
            if number == 0:
                break
            continue
        views.append(_View(row["key"], row["input_ids"], replies.encoder.encode_reply(dataset[view]["test"])))
        shortened += row["key"] != view
    return views, shortened


def _answer_chunk(
    replies: Replies, dataset: ArcDataset, settings: Any,
    views: dict[str, list[_View]], greedy: dict[str, Reply], answers: dict[str, Answer],
) -> None:  # fmt: skip
    # Fills in the answers to some test inputs.
    def grid_of(reply: Reply, key: str) -> np.ndarray | None:
        text = replies.tokenizer.decode(reply.tokens, skip_special_tokens=False)
        options = replies.encoder.format
        return dataset.decode(text, options["lines_sep"], key=key, reply_end=options["reply_end"])[0]

    def reply_of(grid: np.ndarray, key: str) -> np.ndarray:
        return replies.encoder.encode_reply(transform_grid(grid, key.split(".")[1:]))

    prompts, guesses = [], []
    for key, key_views in views.items():
        grid = answers[key].greedy = grid_of(greedy[key], key_views[0].key)
        answers[key].greedy_log_prob = greedy[key].log_prob
        prompts += [view.prompt for view in key_views]
        guesses += [view.guess if grid is None else reply_of(grid, view.key) for view in key_views]
    if settings.decoding == "search":
        decoded = iter(replies.searched(prompts, guesses, settings.min_prob))
    elif settings.decoding == "sample":
        decoded = iter(replies.sampled(prompts, guesses, settings.samples, settings.temperature))
    else:
        decoded = iter([[reply] for reply in replies.greedy(prompts, guesses)])
    to_score: list[tuple[np.ndarray, list[np.ndarray]]] = []  # prompts, and the replies to score after each
    known: dict[tuple[str, str], float] = {}  # (prompt, reply) -> log probability that decoding has computed
    for key, key_views in views.items():
        of_view = [next(decoded) for _ in key_views]
        if all(reply.tokens.tobytes() != greedy[key].tokens.tobytes() for reply in of_view[0]):
            # However improbable it is: a model that is sure of nothing still has a first guess.
            of_view[0].append(greedy[key])
        grids = []
        for view, view_replies in zip(key_views, of_view, strict=True):
            known |= {(token_hash(view.prompt), token_hash(reply.tokens)): reply.log_prob for reply in view_replies}
            grids.append([(grid_of(reply, view.key), reply.log_prob) for reply in view_replies])
        candidates = answers[key].candidates = gather_candidates(grids)
        to_score += [(view.prompt, [reply_of(c.grid, view.key) for c in candidates]) for view in key_views]
        solution = dataset[key]["solution"]
        if solution is not None:
            to_score.append((key_views[0].prompt, [reply_of(solution, key_views[0].key)]))
    scores = iter(_score(replies, to_score, known))
    for key, key_views in views.items():
        by_view = [next(scores) for _ in key_views]
        for number, candidate in enumerate(answers[key].candidates):
            candidate.scored = [of_view[number] for of_view in by_view]
        if dataset[key]["solution"] is not None:
            answers[key].truth = next(scores)[0]


def _score(
    replies: Replies, to_score: Sequence[tuple[np.ndarray, list[np.ndarray]]], known: dict[tuple[str, str], float]
) -> list[list[float]]:
    # Log probabilities: those of decoding where it has computed them, which saves a pass.
    marks = [(token_hash(prompt), [token_hash(reply) for reply in group]) for prompt, group in to_score]
    missing = [
        [reply for reply, mark in zip(group, group_marks, strict=True) if (prompt_mark, mark) not in known]
        for (_, group), (prompt_mark, group_marks) in zip(to_score, marks, strict=True)
    ]
    computed = replies.scored([prompt for prompt, _ in to_score], missing)
    known = dict(known)
    for (prompt_mark, _), group, values in zip(marks, missing, computed, strict=True):
        known |= {(prompt_mark, token_hash(reply)): value for reply, value in zip(group, values, strict=True)}
    return [[known[prompt_mark, mark] for mark in group_marks] for prompt_mark, group_marks in marks]
