"""Selection: which of many candidate grids to submit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
