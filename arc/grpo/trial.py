"""Forward and backward passes of stage 3, for planning how a step is divided (see `arc.training.batch_planning`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.device_sampling import KEPT
from arc.grpo.settings import PolicyRun, PolicySettings
from arc.grpo.sharing import copy_bytes
from arc.grpo.supervised_mix import MASKED_REPLIES, SupervisedMix, learned_tokens
from arc.models.prompt_sharing import reply_log_probs
from arc.runs.processes import process_count
from arc.training.data import StageData
from arc.training.stage import BatchPlan
from arc.training.trials import Trial, uniform_row

if TYPE_CHECKING:
    import torch


class PolicyTrial(Trial[PolicySettings]):
    """Passes of the reinforcement learning.

    A batch is a tuple: one prompt for each completion, the completions, and the supervised batch (or None).
    `max_completion_length` is in tokens; `from_copy` says that completions are sampled from a copy of the model, which
    takes memory; without a `mix` the loss is the policy's alone.
    """

    padding_free = True
    tells_time = False  # a step's time is mostly sampling, which is not tried here

    def __init__(
        self, model: Any, run: PolicyRun, data: StageData, max_completion_length: int, from_copy: bool,
        mix: SupervisedMix | None = None,
    ):  # fmt: skip
        import torch

        settings, other_bytes = run.settings, 0
        if from_copy and torch.cuda.is_available():
            other_bytes = copy_bytes(model, settings)
            other_bytes += math.ceil(KEPT * torch.cuda.get_device_properties(0).total_memory)
        if settings.beta > 0:  # trl keeps a copy of the adapter as it was at the start
            other_bytes += 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        super().__init__(model, run, other_bytes)
        self.samples, self.length, self.group = data.samples, max_completion_length, settings.num_generations
        self.mix, self.step_size = mix, settings.samples_per_step // process_count()

    def longest(self, size: int) -> Any:
        """A batch of as many different prompts as a step can have; all rows have the longest length."""
        settings, rng = self.run.settings, np.random.default_rng(0)
        vocabulary = self.model.config.vocab_size
        count = min(size, math.ceil(self.step_size / self.group) + (process_count() > 1))
        prompts = [rng.integers(0, vocabulary, settings.max_seq_length) for _ in range(count)]
        distinct = count if settings.stop_at_error else size  # stopped completions of a prompt follow one solution
        completions = [rng.integers(0, vocabulary, self.length) for _ in range(distinct)]
        supervised = None
        if self.mix is not None:
            tokens = min(settings.max_seq_length, int(self.samples.lengths().max()))
            row = uniform_row(tokens, MASKED_REPLIES, vocabulary)
            supervised = self.mix.collator([row] * self.mix.rows_of_pass(size, self.step_size))
        return _repeated(prompts, size), _repeated(completions, size), supervised

    def typical(self, size: int) -> list[Any]:
        """Batches of the first prompts with completions as long as the solutions; stopped ones equal the solution."""
        prompts_per_batch, rng = max(1, size // self.group), np.random.default_rng(0)
        vocabulary, batches = self.model.config.vocab_size, list[Any]()
        for begin in (0, prompts_per_batch):
            rows = self.samples.__getitems__(list(range(begin, begin + prompts_per_batch)))
            split = _repeated([(row["input_ids"], int(row["reply_spans"][-1][0])) for row in rows], size)
            completions = [ids[reply:][: self.length] for ids, reply in split]
            if not self.run.settings.stop_at_error:
                completions = [rng.integers(0, vocabulary, len(completion)) for completion in completions]
            supervised = None
            if self.mix is not None:
                numbers = self.mix.rows(len(batches))[: self.mix.rows_of_pass(size, self.step_size)]
                supervised = self.mix.collator(self.samples.__getitems__(numbers))
            batches.append(([ids[:reply] for ids, reply in split], completions, supervised))
        return batches

    def tokens(self, batch: Any) -> int:
        """Tokens of the completions. The prompts' share is about the same in each batch."""
        return sum(map(len, batch[1]))

    def tokens_per_step(self, plan: BatchPlan) -> float:
        """Tokens of the completions of a step, estimated from the timed batch."""
        return float(self.tokens(self.typical(plan.micro_batch_size)[-1]) * plan.passes)

    def loss(self, batch: Any) -> torch.Tensor:
        """A sum over all tokens, as GRPO's loss is, plus the supervised loss."""
        from accelerate.utils import send_to_device

        prompts, completions, supervised = batch
        loss = reply_log_probs(self.model, self.run.precision.engine, prompts, completions)[0].mean()
        if self.mix is None or supervised is None:
            return loss
        supervised = send_to_device(supervised, self.device)
        return loss + self.mix.divided_sum(self.model, supervised, learned_tokens(supervised))


def _repeated(rows: Sequence[Any], size: int) -> list[Any]:
    """Rows repeated in place up to a number of `size`: [a, b] -> [a, a, b, b]."""
    return [rows[at * len(rows) // size] for at in range(size)]
