"""Views of a puzzle: which augmented keys there are."""

from __future__ import annotations

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.keys import seeded_rng

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
