"""The rows of a supervised training: their order, and datasets that make a row when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from arc.puzzles.encoding import TrainingSamples
from arc.runs.settings import RunSettings
from arc.training.data import StageData
from arc.training.stage import StageContext


class EpochSampler:
    """Rows of an epoch in a seeded order that depends on (seed, epoch) alone.

    Yields `epoch * rows + index`: a row number names its epoch, so that each epoch has views of its own in whatever
    process a row is made. Several processes take turns with whole forward passes. So an epoch is filled up to a
    multiple of `multiple_of` with the number `filler`, of which nothing is learned (see `FilledSamples`).
    """

    def __init__(self, rows: int, seed: int, multiple_of: int = 1, filler: int = -1):
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.fillers = [filler] * (-rows % multiple_of)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        """Row numbers of the current epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return iter((self.epoch * self.rows + order).tolist() + self.fillers)

    def __len__(self) -> int:
        """Rows of one epoch, with the fillers."""
        return self.rows + len(self.fillers)


class FilledSamples:
    """Samples, and one more row number, `filler`, that gives a short row of which nothing is learned.

    With it all processes have equally many forward passes, and no view is seen twice. The loss is a sum over the
    learned tokens of all processes, to which such a row adds nothing.
    """

    TOKENS = 8

    def __init__(self, samples: TrainingSamples, filler: int):
        self.samples, self.filler = samples, filler

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; "filler" marks those of which nothing is learned."""
        rows = self.samples.__getitems__([0 if number == self.filler else number for number in numbers])
        return [
            {**row, "input_ids": row["input_ids"][: self.TOKENS], "reply_spans": row["reply_spans"][:0], "filler": True}
            if number == self.filler
            else {**row, "filler": False}
            for number, row in zip(numbers, rows, strict=True)
        ]


def lazy_dataset(rows: Any, count: int) -> Any:
    """A datasets.Dataset of `count` row numbers whose rows are made when read (trl takes no other map-style one)."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"row": list(range(count))})
    # Without the wrapper of datasets: for a fingerprint it pickles all puzzles (19 s under a profiler).
    Dataset.set_format.__wrapped__(dataset, "custom", transform=partial(_columns, rows))
    return dataset


def _columns(source: Any, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
    # Rows by their numbers. A module's function can be pickled: processes that make batches may be no forks.
    is_list = not hasattr(source, "__getitems__")
    rows = [source[number] for number in batch["row"]] if is_list else source.__getitems__(batch["row"])
    return {name: [row[name] for row in rows] for name in rows[0]}


def planned_rows(run: StageContext[RunSettings], data: StageData, rows_per_step: int) -> int:
    """Row numbers of all epochs that the training may enter: each epoch has views of its own."""
    rows, settings = len(data.samples), run.settings
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps * rows_per_step / rows
    return rows * (math.ceil(epochs) + 1)  # one more: a trainer counts an epoch's last, short batch as a step
