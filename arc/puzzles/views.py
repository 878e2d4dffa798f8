"""Views of puzzles: the augmented keys that training and voting use."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from arc.puzzles.grids import Puzzle
from arc.puzzles.keys import View, puzzle_of, seeded_rng


class PuzzleSource(Protocol):
    """The part of a dataset that views need."""

    keys: list[str]
    challenge: dict[str, Puzzle]

    def resolve(self, key: str) -> View:
        """See `keys.resolve`."""


SYMMETRIES = tuple(".tp" * transposed + ".rt" * turns for turns in range(4) for transposed in range(2))


def view_keys(dataset: PuzzleSource, key: str, views: int, seed: int = 42, keep_background: bool = False) -> list[str]:
    """Keys of views of one test input. More views do not change the first ones.

    The first is `key` itself, a test input without transforms. View i has symmetry i modulo 8, and a colour permutation
    and an order of the demonstrations drawn from the seed, the key and i. `keep_background`: colour 0 stays 0.
    """
    count = len(dataset.resolve(key).order)
    keys = [key]
    for number in range(1, views):
        rng = seeded_rng(seed, key, str(number))
        colours = [0, *(1 + rng.permutation(9))] if keep_background else rng.permutation(10)
        order = "-".join(map(str, rng.permutation(count)))
        keys.append(f"{key}{SYMMETRIES[number % 8]}.perm{''.join(map(str, colours))}.ex{order}")
    return keys


def _mixed(values: np.ndarray) -> np.ndarray:  # SplitMix64's finaliser, uint64
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def counter_draws(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Random uint64 (rows, count) that depend on (seed, epoch, index) and the column alone.

    A numpy generator for each row would take 20 times as long as the rest of making a view.

    Source: SplitMix64 (Steele, Lea and Flood 2014), as a counter-based generator.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mixed(np.full(len(indices), int(seed) % 2**64, dtype=np.uint64) + step)
    state = _mixed(state + epochs.astype(np.uint64) * step)
    state = _mixed(state + indices.astype(np.uint64) * step)
    return _mixed(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * step)


class Views:
    """Augmented views of a dataset's keys. A view depends on (seed, epoch, index) alone; nothing is stored.

    The index counts the symmetries of the first key, then those of the second, and so on. With tp and rt "all" they are
    "", .tp, .rt, .tp.rt, .rt.rt, ... Each epoch draws symmetry, colours and order of the demonstrations anew.
    """

    def __init__(
        self, dataset: PuzzleSource, seed: int, tp: bool | str = False, rt: bool | str = False, perm: bool = False,
        keep_background: bool = False, shfl_ex: bool = False, perm_share: float = 1.0,
    ):  # fmt: skip
        """Choose the augmentations.

        Args:
            dataset: new transforms follow those of its keys.
            seed: of all draws.
            tp: transpose: "all" lists both, True draws one, False does not transpose.
            rt: rotation: "all" lists the four, True draws one, False does not rotate.
            perm: permute the colours.
            keep_background: colour 0 stays 0.
            shfl_ex: shuffle the demonstrations of the key.
            perm_share: share of the views that `perm` changes, chosen at random.

        Raises:
            ValueError: another value of tp or rt, or a share outside 0 .. 1.
        """
        if not 0 <= perm_share <= 1:
            raise ValueError(f"perm_share is {perm_share}, expected a share from 0 to 1")
        for name, value in (("tp", tp), ("rt", rt)):
            if value not in (True, False, "all"):
                raise ValueError(f'{name} is {value!r}, expected "all", True or False')
        self.dataset, self.seed = dataset, seed
        self.tp, self.rt = (value if value == "all" else bool(value) for value in (tp, rt))
        self.perm, self.keep_background, self.shfl_ex, self.perm_share = perm, keep_background, shfl_ex, perm_share
        self.symmetries = [
            ".tp" * transposed + ".rt" * turns
            for turns in range(4 if rt == "all" else 1)
            for transposed in range(2 if tp == "all" else 1)
        ]

    def __len__(self) -> int:
        """Views of one epoch."""
        return len(self.dataset.keys) * len(self.symmetries)

    def key(self, epoch: int, index: int) -> str:
        """The key of one view. IndexError: no such index."""
        return self.keys(np.array([epoch]), np.array([index]))[0]

    def keys(self, epochs: np.ndarray, indices: np.ndarray) -> list[str]:
        """The keys of many views at once, 10 times faster than one by one; epochs and indices are int (rows,).

        Raises:
            IndexError: an index outside 0 .. len - 1, or a negative epoch.
        """
        epochs, indices = np.asarray(epochs), np.asarray(indices)
        if not len(indices):
            return []
        if indices.min() < 0 or indices.max() >= len(self) or epochs.min() < 0:
            largest = f"view {indices.max()} (smallest {indices.min()})"
            raise IndexError(f"{largest} of {len(self):,} in epoch {epochs.min()}")
        bases = [self.dataset.keys[i] for i in (indices // len(self.symmetries)).tolist()]
        suffixes = [self.symmetries[i] for i in (indices % len(self.symmetries)).tolist()]
        counts = [self._demonstrations(key) for key in bases] if self.shfl_ex else [0]
        draws = counter_draws(self.seed, epochs, indices, 12 + max(counts))
        if self.tp is True or self.rt is True:
            # Transposes stand before rotations, drawn or enumerated, so that a suffix reads the same either way.
            transposed = (draws[:, 0] >> np.uint64(63)).tolist() if self.tp is True else [0] * len(bases)
            turns = (draws[:, 1] >> np.uint64(62)).tolist() if self.rt is True else [0] * len(bases)
            suffixes = [".tp" * t + s + ".rt" * r for t, s, r in zip(transposed, suffixes, turns, strict=True)]
        if self.perm:
            order = draws[:, 2:12]
            if self.keep_background:
                order[:, 0] = 0  # the smallest draw: colour 0 comes first
            digits = (np.argsort(order, axis=1).astype(np.uint8) + 48).tobytes().decode("ascii")
            permuted = [f"{s}.perm{digits[10 * i : 10 * i + 10]}" for i, s in enumerate(suffixes)]
            if self.perm_share < 1:  # from the bits that draw no rotation
                keep = (draws[:, 1] << np.uint64(2)) / 2.0**64 >= self.perm_share
                permuted = [s if same else p for s, p, same in zip(suffixes, permuted, keep.tolist(), strict=True)]
            suffixes = permuted
        if self.shfl_ex:
            order = draws[:, 12:]
            order[np.arange(order.shape[1]) >= np.array(counts)[:, None]] = np.iinfo(np.uint64).max  # sorted behind
            orders = np.argsort(order, axis=1, kind="stable").tolist()
            chosen = ("-".join(map(str, order[:count])) for order, count in zip(orders, counts, strict=True))
            suffixes = [f"{suffix}.ex{numbers}" for suffix, numbers in zip(suffixes, chosen, strict=True)]
        return [base + suffix for base, suffix in zip(bases, suffixes, strict=True)]

    def _demonstrations(self, key: str) -> int:
        if ".ex" in key:
            return len(self.dataset.resolve(key).order)
        return len(self.dataset.challenge[puzzle_of(key)]["train"])
