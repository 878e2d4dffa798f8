"""Prompts of stage 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arc.grpo.settings import PolicySettings
from arc.training.data import StageData
from arc.training.stage import StageContext


def report_prompts(run: StageContext[PolicySettings], data: StageData, max_completion_length: int) -> None:
    """Print one prompt, how many there are and how long prompts and completions may be."""
    settings = run.settings
    completions = settings.samples_per_step
    row = PromptRows(data).__getitems__([0])[0]
    print(f"key {row['key']}\n{row['prompt']}")
    print(
        f"{len(data.samples):,} prompts, with their replies up to {settings.max_seq_length} tokens; completions of up "
        f"to {max_completion_length}; a step: {completions // settings.num_generations} prompts x "
        f"{settings.num_generations} completions; {settings.max_steps} steps"
    )


class PromptRows:
    """Prompts of the samples, for trl's GRPOTrainer: "prompt" (text), "key" (view), "prompt_ids", "solution_ids".

    Args:
        data: gives the samples.
        chosen: rows of the first epoch that are used, int (rows,); None: all. Each further epoch holds the same puzzles
            in the same symmetries, with colours and orders of its own.
    """

    def __init__(self, data: StageData, chosen: np.ndarray | None = None):
        """See the class."""
        self.data, self.chosen = data, chosen

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; a prompt leaves room for its reply within the longest row."""
        if self.chosen is not None:
            epochs, places = np.divmod(np.asarray(rows, dtype=np.int64), len(self.chosen))
            rows = (epochs * len(self.data.samples) + self.chosen[places]).tolist()
        different = sorted(set(rows))  # trl asks for each row once for each completion of its group
        made = {}
        for row, sample in zip(different, self.data.samples.__getitems__(different), strict=True):
            task = self.data.puzzles.fmt_task(sample["key"], **self.data.format)
            begin, end = sample["reply_spans"][-1]
            ids = np.asarray(sample["input_ids"], dtype=np.int64)
            made[row] = {
                "prompt": task["input"], "key": task["key"], "prompt_ids": ids[:begin], "solution_ids": ids[begin:end],
            }  # fmt: skip
        return [made[row] for row in rows]
