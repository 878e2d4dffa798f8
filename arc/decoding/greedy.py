"""Answers to puzzles: greedy replies, how many of them are right, and which of many candidate grids to submit.

Search, sampling and scoring of token ids are in arc/decoding/search.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arc.models.loading import decoding
from arc.puzzles.dataset import ArcDataset, format_options, seeded_rng
from arc.puzzles.files import MAX_SIDE


def generate_replies(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int = 8,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """Greedy replies to prompts, or sampled ones, by the model's own `generate`.

    Args:
        model: a causal language model (in training or not: it is switched to decoding and back).
        engine: "unsloth" or "transformers".
        tokenizer: gives the pad and the end token.
        prompts: token ids, each (tokens,).
        max_new_tokens: longest reply.
        batch_size: prompts decoded at once.
        temperature: of the sampling; 0: greedy.
        seed: of the sampling, which depends on prompts and batch size too. torch's own generators stay as they are.

    Returns:
        Token ids of each reply, in the prompts' order, end token included if there is one, without padding.
    """
    import torch

    replies: list[np.ndarray | None] = [None] * len(prompts)
    # Prompts of about one length together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    # Explicit, because a model's own configuration may cut the distribution.
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with decoding(model, engine), torch.random.fork_rng(enabled=bool(temperature)):
        if temperature:
            torch.manual_seed(seed)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = np.full((len(chosen), width), tokenizer.pad_token_id, dtype=np.int64)
            mask = np.zeros((len(chosen), width), dtype=np.int64)
            for row, i in enumerate(chosen):  # on the left, so that every reply begins in the same column
                ids[row, width - len(prompts[i]) :] = prompts[i]
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max_new_tokens,
                **(how or {"do_sample": False}),
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            for row, i in enumerate(chosen):
                reply = out[row, width:].cpu().numpy()
                ends = np.flatnonzero(reply == end)
                replies[i] = reply[: ends[0] + 1] if len(ends) else reply
    return [reply for reply in replies if reply is not None]


class GreedyAnswer(NamedTuple):
    """A greedy reply and what it is worth.

    Attributes:
        tokens: int64 (tokens,), see `generate_replies`.
        decodable: whether it is a grid.
        solved: whether it is the solution.
    """

    tokens: np.ndarray
    decodable: bool
    solved: bool


def greedy_answers(
    model: Any,
    engine: str,
    tokenizer: Any,
    dataset: ArcDataset,
    prompts: Sequence[dict[str, Any]],
    *,
    batch_size: int,
) -> list[GreedyAnswer]:
    """Decode prompts greedily and compare with the solutions.

    Args:
        model, engine, tokenizer, batch_size: see `generate_replies`.
        dataset: holds the solutions.
        prompts: rows with "key" and "input_ids", as SampleEncoder gives them with reply=False.
    """
    options = format_options(tokenizer.eos_token)
    longest = longest_reply(dataset, [row["key"] for row in prompts], tokenizer)
    replies = generate_replies(model, engine, tokenizer, [row["input_ids"] for row in prompts], longest, batch_size)
    answers = []
    for row, reply in zip(prompts, replies, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=False)
        grid, correct, _ = dataset.decode(text, options["lines_sep"], key=row["key"], reply_end=options["reply_end"])
        answers.append(GreedyAnswer(reply, grid is not None, correct is True))
    return answers


def exact_match(
    model: Any,
    engine: str,
    tokenizer: Any,
    dataset: ArcDataset,
    prompts: Sequence[dict[str, Any]],
    *,
    batch_size: int,
) -> dict[str, float]:
    """`eval_exact_match` and `eval_decodable`, shares of the prompts; see `greedy_answers`."""
    answers = greedy_answers(model, engine, tokenizer, dataset, prompts, batch_size=batch_size)
    return {
        "eval_exact_match": sum(answer.solved for answer in answers) / len(answers),
        "eval_decodable": sum(answer.decodable for answer in answers) / len(answers),
    }


def can_become_grid(text: str, lines_sep: str) -> bool:
    """Whether a reply that begins like this can still be one that `ArcDataset.decode` reads.

    Args:
        text: the reply so far, without its end.
        lines_sep: what stands between rows, one character.
    """
    *rows, last = text.split(lines_sep)
    width = len(rows[0]) if rows else MAX_SIDE
    return (
        len(rows) + bool(last) <= MAX_SIDE
        and len(last) <= width <= MAX_SIDE
        and all(len(row) == width for row in rows)
        and (not rows or width > 0)
        and all(not row or (row.isascii() and row.isdigit()) for row in (*rows, last))
    )


def longest_reply(dataset: ArcDataset, keys: Sequence[str], tokenizer: Any) -> int:
    """Tokens of the longest reply to any of the keys, end token included, in whichever orientation is longer."""
    options = format_options(tokenizer.eos_token)
    shapes = {
        dataset.solutions[dataset.get_base_key(key)][dataset.get_base_key_and_reply_num(key)[1]].shape for key in keys
    }
    longest = 0
    for shape in shapes | {shape[::-1] for shape in shapes}:
        text = ArcDataset.fmt_output(
            np.zeros(shape, dtype=np.uint8), options["reply_end"], lines_sep=options["lines_sep"]
        )
        longest = max(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return longest


# ---------------------------------------------------------------------------------------------------------------------
# Views of a puzzle

SYMMETRIES = tuple(".tp" * transposed + ".rt" * turns for turns in range(4) for transposed in range(2))


def view_keys(dataset: ArcDataset, key: str, views: int, seed: int = 42, keep_background: bool = False) -> list[str]:
    """Keys of views of one test input; asking for more of them leaves the first ones as they are.

    The first is the key itself. View i has symmetry i modulo 8, a colour permutation and an order of the demonstrations
    of its own, which depend on the seed, the key and i alone.

    Args:
        dataset: holds the puzzle.
        key: a test input, without transforms.
        views: how many, from 1.
        seed: of the draws.
        keep_background: colour 0 stays 0.
    """
    count = len(dataset.resolve(key).order)
    keys = [key]
    for number in range(1, views):
        rng = seeded_rng(seed, key, str(number))
        colours = [0, *(1 + rng.permutation(9))] if keep_background else rng.permutation(10)
        order = "-".join(map(str, rng.permutation(count)))
        keys.append(f"{key}{SYMMETRIES[number % 8]}.perm{''.join(map(str, colours))}.ex{order}")
    return keys


# ---------------------------------------------------------------------------------------------------------------------
# Which of many grids: no model is needed here


@dataclass(eq=False)
class Candidate:
    """A grid that was found as the answer to a test input, in one view or several.

    Args:
        grid: uint8 (height, width), as the puzzle itself shows it.
        found: number of a view -> log probability of the replies of that view that mean this grid.
        scored: log probability of the grid under each view, found there or not, (views,); None: not known.
    """

    grid: np.ndarray
    found: dict[int, float] = field(default_factory=dict)
    scored: list[float] | None = None


def gather_candidates(views: Sequence[Sequence[tuple[np.ndarray | None, float]]]) -> list[Candidate]:
    """Merge what the views of one test input have found.

    Args:
        views: for each view its replies, each a grid mapped back as `ArcDataset.decode` gives it (None: it is no grid,
            and left out) and a log probability. Replies of a view are disjoint, so those of one grid add up.

    Returns:
        One candidate for each different grid, in the order in which they come first.
    """
    merged: dict[tuple[tuple[int, ...], bytes], Candidate] = {}
    for view, replies in enumerate(views):
        for grid, log_prob in replies:
            if grid is None:
                continue
            grid = np.ascontiguousarray(grid, dtype=np.uint8)
            candidate = merged.setdefault((grid.shape, grid.tobytes()), Candidate(grid))
            before = candidate.found.get(view, -math.inf)
            candidate.found[view] = float(np.logaddexp(before, log_prob))
    return list(merged.values())


def select(candidates: Sequence[Candidate], rule: str = "product", count: int = 2) -> list[np.ndarray]:
    """The best grids by a rule.

    - first_view: probability in view 0; what it has not found is no candidate. What a system without views would say.
    - max: the highest probability in any view that found it.
    - sum: the sum of the probabilities in the views that found it.
    - product: the product of the probabilities under all views (product of experts).
    - majority: how many views have it as their most probable grid.

    Ties are broken by the sum, then by shape and cells, so that the order of views and candidates does not matter.

    Args:
        candidates: of one test input, different grids, as `gather_candidates` gives them.
        rule: a name from `RULES`.
        count: how many grids.

    Returns:
        Up to `count` grids, the best first.

    Raises:
        ValueError: no such rule, or "product" where a candidate has not been scored.

    Source: Franzen et al. 2025, arXiv 2505.07859, for the product; sum and max as in their code of 2024.
    """
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r}: expected one of {', '.join(RULES)}")
    if rule == "first_view":
        candidates = [candidate for candidate in candidates if 0 in candidate.found]
    unscored = sum(candidate.scored is None for candidate in candidates)
    if rule == "product" and unscored:
        raise ValueError(f"{unscored} of {len(candidates)} candidates have not been scored: the product needs it")
    ranks = sorted(range(len(candidates)), key=lambda i: _identity(candidates[i]))
    sums = [math.fsum(math.exp(log_prob) for log_prob in candidate.found.values()) for candidate in candidates]
    ranks.sort(key=lambda i: -sums[i])
    scores = {
        "first_view": lambda i: candidates[i].found[0],
        "max": lambda i: max(candidates[i].found.values(), default=-math.inf),
        "sum": lambda i: sums[i],
        "product": lambda i: math.fsum(candidates[i].scored or []),
        "majority": lambda i: votes[i],
    }
    votes = dict.fromkeys(ranks, 0)
    for view in sorted({view for candidate in candidates for view in candidate.found}):
        # `ranks` is in the order of the tie-break, and the first of equals is taken.
        votes[max(ranks, key=lambda i, view=view: candidates[i].found.get(view, -math.inf))] += 1
    ranks.sort(key=lambda i: -scores[rule](i))
    return [candidates[i].grid for i in ranks[:count]]


RULES = ("first_view", "max", "sum", "product", "majority")


def _identity(candidate: Candidate) -> tuple[tuple[int, ...], bytes]:
    return candidate.grid.shape, candidate.grid.tobytes()
