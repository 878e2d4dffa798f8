"""Selection: which candidate grids to submit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Candidate:
    """A possible answer to a test input, from one or several views."""

    grid: np.ndarray  # uint8 (height, width), in the orientation and colours of the puzzle
    # Number of a view -> log probability of that view's replies that decode to this grid.
    found: dict[int, float] = field(default_factory=dict)
    scored: list[float] | None = None  # log probability of the grid under every view, (views,); None: not computed


def gather_candidates(views: Sequence[Sequence[tuple[np.ndarray | None, float]]]) -> list[Candidate]:
    """Merge the replies of all views of one test input, in the order of first replies.

    Args:
        views: for each view its replies: (grid as `ArcDataset.decode` maps it back, log probability). None is left
            out. The replies of a view exclude each other, so the probabilities of equal grids add up.
    """
    merged: dict[tuple[tuple[int, ...], bytes], Candidate] = {}
    for view, replies in enumerate(views):
        for grid, log_prob in replies:
            if grid is None:
                continue
            grid = np.ascontiguousarray(grid, dtype=np.uint8)
            by_view = merged.setdefault((grid.shape, grid.tobytes()), Candidate(grid)).found
            by_view[view] = float(np.logaddexp(by_view.get(view, -math.inf), log_prob))
    return list(merged.values())


def select(candidates: Sequence[Candidate], rule: str = "product", count: int = 2) -> list[np.ndarray]:
    """The best grids by a rule of `RULES`, up to `count`, best first.

    - first_view: the probability in view 0, whose grids alone are candidates: a system without augmentation.
    - max: the highest probability in a view.
    - sum: the sum of the probabilities in the views that gave it.
    - product: the product of the probabilities under all views (product of experts).
    - majority: the number of views whose most probable grid it is.

    Ties are broken by the sum, then by shape and cells: the order of views and candidates does not matter.

    Raises:
        ValueError: an unknown rule, or "product" with a candidate that has not been scored.

    Source: Franzen et al. 2025, arXiv 2505.07859, for the product; sum and max as in their code of 2024.
    """
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r}: expected one of {', '.join(RULES)}")
    if rule == "first_view":
        candidates = [candidate for candidate in candidates if 0 in candidate.found]
    unscored = sum(candidate.scored is None for candidate in candidates)
    if rule == "product" and unscored:
        raise ValueError(f"{unscored} of {len(candidates)} candidates have not been scored: the product needs it")
    ranks = sorted(range(len(candidates)), key=lambda i: (candidates[i].grid.shape, candidates[i].grid.tobytes()))
    sums = [math.fsum(math.exp(log_prob) for log_prob in candidate.found.values()) for candidate in candidates]
    ranks.sort(key=lambda i: -sums[i])
    votes = dict.fromkeys(ranks, 0)
    for view in sorted({view for candidate in candidates for view in candidate.found}):
        # `ranks` is in the order of the tie-break, and the first of equals is taken.
        def probability(i: int, view: int = view) -> float:
            return candidates[i].found.get(view, -math.inf)

        votes[max(ranks, key=probability)] += 1
    scores: dict[str, Callable[[int], float]] = {
        "first_view": lambda i: candidates[i].found[0],
        "max": lambda i: max(candidates[i].found.values(), default=-math.inf),
        "sum": lambda i: sums[i],
        "product": lambda i: math.fsum(candidates[i].scored or []),
        "majority": lambda i: votes[i],
    }
    ranks.sort(key=lambda i: -scores[rule](i))
    return [candidates[i].grid for i in ranks[:count]]


RULES = ("first_view", "max", "sum", "product", "majority")
