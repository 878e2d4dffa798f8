"""Keys: what names a view of a puzzle, and random numbers that depend on names alone."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from arc.puzzles.files import Pairs

COLOURS = "0123456789"


def seed_words(seed: int | None, *names: str) -> list[int]:
    if seed is None:
        return [int(word) for word in np.random.SeedSequence().generate_state(2)]
    return [int(seed) % 2**64, *(zlib.crc32(name.encode()) for name in names)]


def seeded_rng(seed: int | None, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone; seed None: on nothing."""
    return np.random.default_rng(seed_words(seed, *names))


def seeded_rank(seed: int, name: str) -> bytes:
    """Place of a name in a seeded order that does not depend on which other names there are."""
    return hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 in, well mixed uint64 out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def counter_draws(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Random uint64 (rows, count) that depend on (seed, epoch, index) and the column alone.

    A numpy generator for each row would do as well, and take 20 times longer than the rest of making a view.

    Source: SplitMix64 (Steele, Lea and Flood 2014), as a counter-based generator.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    state = mixed(np.full(len(indices), int(seed) % 2**64, dtype=np.uint64) + step)
    state = mixed(state + epochs.astype(np.uint64) * step)
    state = mixed(state + indices.astype(np.uint64) * step)
    return mixed(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * step)


class View(NamedTuple):
    """A key resolved against a dataset: which grids, and how they are turned and coloured."""

    train: Pairs
    order: Sequence[int]
    query: int  # number of the test input in the store, -1: none
    solution: int  # number of its output, -1: unknown
    symmetry: tuple[int, int, int]  # transpose, then mirror the order of rows, then of columns
    colours: str  # colour c becomes the digit at position c


def split_name(key: str) -> tuple[str, int]:
    """Puzzle id and test index (-1: none) of a key."""
    name = key.partition(".")[0]
    puzzle, separator, number = name.partition("_")
    if not separator:
        return puzzle, -1
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"key {key!r}: found test index {number!r}, expected PUZZLE_INDEX such as 007bbfb7_0")
    return puzzle, int(number)


def check_colours(transform: str) -> str:
    """The ten digits of `perm...`."""
    colours = transform[4:]
    if len(colours) != 10 or frozenset(colours) != frozenset(COLOURS):
        raise ValueError(f"found {transform!r}, expected perm and each of the digits 0 to 9 once")
    return colours


def check_order(transform: str, count: int) -> list[int]:
    """The numbers of `ex...`, each a different one of `count` demonstrations."""
    words = transform[2:].split("-")
    order = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
    if min(order) < 0 or max(order) >= count or len(set(order)) < len(order):
        raise ValueError(
            f"found {transform!r}, expected different numbers of the {count} demonstrations, 0 to {count - 1}"
        )
    return order


def turned(symmetry: tuple[int, int, int], transform: str) -> tuple[int, int, int]:
    """A symmetry (transpose, mirror rows, mirror columns) followed by tp or rt."""
    transposed, rows, columns = symmetry
    # rot90 is a transpose followed by a mirror of the rows.
    return (1 - transposed, columns, rows) if transform == "tp" else (1 - transposed, 1 - columns, rows)


def shortened_key(key: str, count: int) -> str:
    """A key with only the first `count` of its demonstrations."""
    parts = key.split(".")
    if parts[-1].startswith("ex"):
        parts[-1] = "-".join(parts[-1].split("-")[:count])
    else:
        parts.append("ex" + "-".join(map(str, range(count))))
    return ".".join(parts)
