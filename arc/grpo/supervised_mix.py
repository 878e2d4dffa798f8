"""Stage 2's loss beside the policy's: in each step of stage 3 a batch of its own, whose outputs are learned.

A policy gradient says which of the answers that a model gives already are right; nothing in it holds in place what the
model has learned besides. "Training language models to follow instructions with human feedback" (Ouyang et al. 2022,
arXiv:2203.02155, PPO-ptx) adds the loss of the training before, on batches of its data; here that is stage 2's, on the
same puzzles as the policy's prompts, in views of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.grpo.settings import PolicySettings
from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import IGNORE_INDEX
from arc.runs.processes import gather, process_count, process_index
from arc.runs.workers import leaving_signals
from arc.training.data import StageData
from arc.training.rows import EpochSampler, planned_rows
from arc.training.stage import StageContext

if TYPE_CHECKING:
    import torch


MASKED_REPLIES = 1  # stage 2's default: a rule cannot be known before its first pair


class SupervisedMix:
    """Batches of stage 2's kind, one for each step, and their loss.

    Which puzzles a step learns depends on the seed and the step alone: a continued run sees what an uninterrupted one
    does, and several processes divide what one would have.

    Args:
        run: its settings say how many samples a step has (`supervised_batch_size`), and for how many steps.
        data: rows and tokenizer.
    """

    def __init__(self, run: StageContext[PolicySettings], data: StageData):
        """See the class; nothing is made before `loss` is called."""
        self.settings, self.samples, self.passes = run.settings, data.samples, 1
        self.own = run.settings.supervised_batch_size // process_count()
        self.collator = InputMaskingDataCollator(data.tokenizer, mask_first_n_examples=MASKED_REPLIES)
        self.collator.packed_for = run.precision.engine
        prompts = run.settings.samples_per_step // run.settings.num_generations
        self.first_epoch = planned_rows(run, data, prompts) // len(data.samples)  # views that no prompt has
        self._order: tuple[int, list[int]] = (-1, [])
        self._batches: Iterator[list[dict[str, Any]]] | None = None
        self._step, self._parts, self._learned = -1, [], 0
        self._sum: Any = 0.0  # of the step's passes so far

    def rows(self, step: int) -> list[int]:
        """Row numbers of the samples of one step, of this process."""
        begin = step * self.settings.supervised_batch_size + process_index() * self.own
        return [self._row(number) for number in range(begin, begin + self.own)]

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.samples))
        epoch += self.first_epoch
        if self._order[0] != epoch:
            sampler = EpochSampler(len(self.samples), self.settings.seed)
            sampler.set_epoch(epoch)
            self._order = (epoch, list(sampler))
        return self._order[1][place]

    def divide(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as batches, one for each pass that has some."""
        parts = np.array_split(np.arange(len(rows)), self.passes)
        return [self.collator([rows[at] for at in part]) for part in parts if len(part)]

    def _from(self, step: int) -> Iterator[list[dict[str, Any]]]:
        import torch

        loader = torch.utils.data.DataLoader(
            self.samples,
            batch_sampler=(self.rows(at) for at in range(step, self.settings.max_steps)),
            collate_fn=self.divide,
            num_workers=self.settings.dataloader_num_workers or 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leaving_signals(),
            generator=torch.Generator(),  # else it would take a number of those that the training draws from
        )
        return iter(loader)

    def close(self) -> None:
        """End the processes that make batches, if there are any."""
        self._batches = None

    def loss(self, model: Any, step: int, part: int, device: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The loss of one pass: those of a step add up to the mean over its learned tokens, if processes take the mean.

        Args:
            model: with packing_tools.use_packed_attention; in training, as a trainer has it.
            step: optimizer steps before this one.
            part: number of the pass in it, from 0; each in turn.
            device: of the model.

        Returns:
            What is to be added to the pass's own loss, and, to be logged, the mean over the step's learned tokens with
            the last pass that has samples, None before it; None for passes that have none.
        """
        from accelerate.utils import send_to_device

        if step != self._step:
            if self._batches is None:
                self._batches = self._from(step)
            self._step, self._parts, self._sum = step, next(self._batches), 0.0
            self._learned = sum(gather(sum(map(learned_tokens, self._parts))))
            if step + 1 >= self.settings.max_steps:
                self.close()
        if part >= len(self._parts):
            return None
        batch = send_to_device(self._parts[part], device, non_blocking=True)
        # The model divides a sum by it; the mean over processes is then the step's.
        divisor = self._learned if process_count() == 1 else self._learned / process_count()
        loss = self.divided_sum(model, batch, divisor)
        self._sum = self._sum + loss.detach()
        return loss, self._sum if part + 1 == len(self._parts) else None

    @staticmethod
    def divided_sum(model: Any, batch: dict[str, Any], divisor: float) -> torch.Tensor:
        """The sum of a batch's loss over its learned tokens, divided by a number.

        Args:
            model: see `loss`.
            batch: on its device.
            divisor: for the mean, the number of learned tokens.
        """
        return model(**batch, num_items_in_batch=divisor).loss

    def rows_of_pass(self, size: int, of: int) -> int:
        """Samples beside so many completions of a pass, of those of a step."""
        return math.ceil(self.own * size / of)


def learned_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that its loss counts."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


def ends_with_training(mix: SupervisedMix) -> Any:
    """A callback that ends the processes of a mix with the training, also where that stops before its last step."""
    from transformers import TrainerCallback

    class EndsWithTraining(TrainerCallback):
        """Closes the mix."""

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            mix.close()

    return EndsWithTraining()
