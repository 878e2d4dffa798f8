"""Rewards of stage 3: pure functions of a reply and its puzzle.

A reply is judged by four components: it is well formed, it has the right shape, some of its cells are right, all are.
A malformed reply earns nothing. Nothing is repaired, skipped or guessed, because reinforcement learning finds whatever
pays without being an answer.

Source: public runs on ARC showed that the exact grid must earn most; the components and their weights are our own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.text import cell_accuracy

NGRAM = 4  # characters; correct grids repeat themselves too, so the excess over the solution's share is logged
COMPONENTS = ("exact_match", "cell_accuracy", "right_shape", "well_formed")


class Components(NamedTuple):
    """The components of a reply's reward, from 0 to 1; each is at most the next."""

    exact_match: float  # 1 for the solution itself
    cell_accuracy: float  # share of right cells of a grid of the right shape; 0 for any other
    right_shape: float  # 1 for a grid with the rows and columns of the solution
    well_formed: float  # 1 for rows of digits of one length that end as a reply must


def judge_components(dataset: ArcDataset, key: str, reply: str, *, reply_end: str, lines_sep: str = "\n") -> Components:
    """Judge one reply to the view `key`; the reply is mapped back through the view's transforms.

    `reply` is the whole text with its end token. It must end with `reply_end`, else it was cut off; text after the
    first end is never read.
    """
    grid, correct, _ = dataset.decode(reply, lines_sep, key=key, reply_end=reply_end)
    if grid is None or correct is None:
        return Components(0.0, 0.0, 0.0, 0.0)
    base_key, reply_number = dataset.get_base_key_and_reply_num(key)
    solution = dataset.solutions[base_key][reply_number]
    return Components(float(correct), cell_accuracy(grid, solution), float(grid.shape == solution.shape), 1.0)


def component_weights(
    *, reward_exact: float = 1.0, reward_cells: float = 0.1, reward_shape: float = 0.0, reward_format: float = 0.0
) -> list[float]:
    """Weights of COMPONENTS, in their order, from the settings of the same names.

    The reward of a reply is the weighted sum. The exact grid has all components and earns `reward_exact` in all, so the
    weight of exact_match is the rest of it.
    """
    return [reward_exact - reward_cells - reward_shape - reward_format, reward_cells, reward_shape, reward_format]


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of a text's n-grams of characters that already occurred in it; 0 for a text with fewer than two n-grams.

    >>> repetition("123123123", 3)  # 123 231 312 123 231 312 123: four of seven
    0.5714285714285714
    """
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def reward_functions(
    dataset: ArcDataset, tokenizer: Any, text_format: dict[str, str], *, stopped: bool = False
) -> list[Callable[..., list[float]]]:
    """One reward function for trl's GRPOTrainer per component, named and ordered as COMPONENTS.

    They decode `completion_ids`: trl's `completions` have no end tokens, so a reply that was cut off would look
    complete. The first also logs completions/repetition (mean of `repetition`) and completions/repetition_excess (mean
    excess over the solution's repetition).

    `text_format` is that of `arc.puzzles.text.format_options`. `stopped` completions end with their first wrong token:
    then only exact_match is used, and no repetition logged.
    """
    options = {name: text_format[name] for name in ("reply_end", "lines_sep")}

    @functools.lru_cache(maxsize=4096)  # the four functions judge the same completions, one after the other
    def judge(key: str, reply: str) -> Components:
        return judge_components(dataset, key, reply, **options)

    @functools.lru_cache(maxsize=4096)  # all completions of a group have one solution
    def solution_repetition(key: str) -> float:
        return repetition(dataset.fmt_task(key, **text_format)["reply"])

    def component(name: str) -> Callable[..., list[float]]:
        def function(completion_ids: Sequence[Sequence[int]], key: Sequence[str], **arguments: Any) -> list[float]:
            replies = tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
            log_metric = arguments.get("log_metric")
            if log_metric is not None and name == COMPONENTS[0] and not stopped:
                shares = [repetition(reply) for reply in replies]
                excess = [max(0.0, share - solution_repetition(k)) for share, k in zip(shares, key, strict=True)]
                log_metric("completions/repetition", sum(shares) / len(shares))
                log_metric("completions/repetition_excess", sum(excess) / len(excess))
            return [getattr(judge(k, reply), name) for k, reply in zip(key, replies, strict=True)]

        function.__name__ = name  # trl logs it by this name
        return function

    return [component(name) for name in COMPONENTS[: 1 if stopped else None]]
