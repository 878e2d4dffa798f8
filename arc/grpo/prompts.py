"""Prompts of stage 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arc.grpo.settings import PolicyRun
from arc.training.data import StageData


def report_prompts(run: PolicyRun, data: StageData, max_completion_length: int) -> None:
    """Print one prompt, how many there are, and how long prompts and completions may be."""
    settings = run.settings
    [row] = PromptRows(data).__getitems__([0])
    print(f"key {row['key']}\n{row['prompt']}")
    print(
        f"{len(data.samples):,} prompts, with their replies up to {settings.max_seq_length} tokens; completions of up "
        f"to {max_completion_length}; a step: {settings.samples_per_step // settings.num_generations} prompts x "
        f"{settings.num_generations} completions; {settings.max_steps} steps"
    )


class PromptRows:
    """Rows for trl's GRPOTrainer: "prompt" (text), "key" (view), "prompt_ids" and "solution_ids" (int64 arrays).

    `chosen` are rows of the first epoch to use, int (rows,); None: all. Later epochs have the same puzzles and
    symmetries, in other colours and orders.
    """

    def __init__(self, data: StageData, chosen: np.ndarray | None = None):
        self.data, self.chosen = data, chosen

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number. A prompt leaves room for its reply within `max_seq_length`."""
        if self.chosen is not None:
            epochs, positions = np.divmod(np.asarray(numbers, dtype=np.int64), len(self.chosen))
            numbers = (epochs * len(self.data.samples) + self.chosen[positions]).tolist()
        distinct = sorted(set(numbers))  # trl asks for a row once per completion of its group
        rows = {}
        for number, sample in zip(distinct, self.data.samples.__getitems__(distinct), strict=True):
            task = self.data.puzzles.fmt_task(sample["key"], **self.data.format)
            begin, end = sample["reply_spans"][-1]
            ids = np.asarray(sample["input_ids"], dtype=np.int64)
            rows[number] = {
                "prompt": task["input"], "key": task["key"], "prompt_ids": ids[:begin], "solution_ids": ids[begin:end],
            }  # fmt: skip
        return [rows[number] for number in numbers]
