"""Stage 2's loss beside the policy's: each step of stage 3 also learns the outputs of a supervised batch.

A policy gradient preserves nothing but the answers that it rewards. So each step adds stage 2's loss, on the same
puzzles as the policy's prompts in other views.

Source: PPO-ptx in "Training language models to follow instructions with human feedback" (Ouyang et al. 2022,
arXiv:2203.02155), which adds the loss of the pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.grpo.settings import PolicyRun
from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import IGNORE_INDEX
from arc.runs.processes import gather, process_count, process_index
from arc.runs.workers import leaving_signals
from arc.training.data import StageData
from arc.training.rows import EpochSampler, planned_rows

if TYPE_CHECKING:
    import torch

MASKED_REPLIES = 1  # as in stage 2: a rule cannot be known before its first pair


class SupervisedMix:
    """One supervised batch per step, and its loss.

    The rows of a step depend on the seed and the step alone. So a continued run learns the same rows as an
    uninterrupted one, and several processes divide the rows that one process would have. The caller sets `passes`, the
    forward passes of a step.
    """

    def __init__(self, run: PolicyRun, data: StageData):
        self.settings, self.samples, self.passes = run.settings, data.samples, 1
        self.rows_per_process = run.settings.supervised_batch_size // process_count()
        self.collator = InputMaskingDataCollator(data.tokenizer, mask_first_n_examples=MASKED_REPLIES)
        self.collator.packed_for = run.precision.engine
        prompts_per_step = run.settings.samples_per_step // run.settings.num_generations
        # The prompts use the views of earlier epochs.
        self.first_epoch = planned_rows(run, data, prompts_per_step) // len(data.samples)
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch, and its row numbers
        self._steps: Iterator[list[dict[str, Any]]] | None = None
        self._step, self._learned = -1, 0  # the current step, and its learned tokens in all processes
        self._micro_batches: list[dict[str, Any]] = []
        self._sum: Any = 0.0  # of the losses of the step so far

    def rows(self, step: int) -> list[int]:
        """Row numbers of this process in one step."""
        begin, rows = step * self.settings.supervised_batch_size + process_index() * self.rows_per_process, []
        for number in range(begin, begin + self.rows_per_process):
            epoch, position = divmod(number, len(self.samples))
            epoch += self.first_epoch
            if self._order[0] != epoch:
                sampler = EpochSampler(len(self.samples), self.settings.seed)
                sampler.set_epoch(epoch)
                self._order = (epoch, list(sampler))
            rows.append(self._order[1][position])
        return rows

    def divide(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Collate rows into one micro-batch per forward pass; fewer, if there are fewer rows."""
        micro_batches = np.array_split(np.arange(len(rows)), self.passes)
        return [self.collator([rows[index] for index in batch]) for batch in micro_batches if len(batch)]

    def _steps_from(self, step: int) -> Iterator[list[dict[str, Any]]]:
        import torch

        generator = torch.Generator()  # the global one is for the training's draws
        return iter(torch.utils.data.DataLoader(
            self.samples, batch_sampler=(self.rows(later) for later in range(step, self.settings.max_steps)),
            collate_fn=self.divide, num_workers=self.settings.dataloader_num_workers or 0, generator=generator,
            pin_memory=torch.cuda.is_available(), worker_init_fn=leaving_signals(),
        ))  # fmt: skip

    def close(self) -> None:
        """End the processes that make batches, if there are any."""
        self._steps = None

    def loss(
        self, model: Any, step: int, micro_batch: int, device: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The loss of one micro-batch, divided by the learned tokens of the step.

        The losses of a step add up to the mean over its learned tokens, where processes average their gradients. Steps
        and micro-batches count from 0 and are asked for in order. `model` has `use_packed_attention`.

        Returns:
            The loss to add to the policy's; and for the log, with the last micro-batch of the step, the step's mean
            (else None). None for a forward pass without supervised rows.
        """
        from accelerate.utils import send_to_device

        if step != self._step:
            if self._steps is None:
                self._steps = self._steps_from(step)
            self._step, self._micro_batches, self._sum = step, next(self._steps), 0.0
            self._learned = sum(gather(sum(map(learned_tokens, self._micro_batches))))
            if step + 1 >= self.settings.max_steps:
                self.close()
        if micro_batch >= len(self._micro_batches):
            return None
        batch = send_to_device(self._micro_batches[micro_batch], device, non_blocking=True)
        divisor = self._learned if process_count() == 1 else self._learned / process_count()
        loss = self.divided_sum(model, batch, divisor)
        self._sum = self._sum + loss.detach()
        return loss, self._sum if micro_batch + 1 == len(self._micro_batches) else None

    @staticmethod
    def divided_sum(model: Any, batch: dict[str, Any], divisor: float) -> torch.Tensor:
        """The sum of a batch's loss over its learned tokens, divided by `divisor`; the batch is on the device."""
        return model(**batch, num_items_in_batch=divisor).loss

    def rows_of_pass(self, completions: int, completions_per_step: int) -> int:
        """Supervised rows of a forward pass with so many completions, at most."""
        return math.ceil(self.rows_per_process * completions / completions_per_step)


def learned_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that its loss counts."""
    return int((batch["labels"] != IGNORE_INDEX).sum())
