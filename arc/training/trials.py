"""Trial passes of a model that is about to be trained: the memory they take, and the time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import IGNORE_INDEX
from arc.puzzles.encoding import TrainingSamples
from arc.runs.needs import count_weights, optimizer_bytes
from arc.runs.processes import agree, process_count
from arc.runs.settings import SupervisedSettings
from arc.runs.troubles import is_out_of_memory
from arc.training.stage import BatchPlan, S, StageContext

if TYPE_CHECKING:
    import torch

FILLED = 0.92  # of the GPU's free memory, at most; the rest is for fragments and for other libraries
TIMED_BATCHES = 3  # of samples in training order, after one that is not timed
TIMED_ROUNDS = 2  # the shortest counts
Batch = dict[str, Any]


class Trial(ABC, Generic[S]):
    """Forward and backward passes of a model that is about to be trained. They leave no trace.

    `other_bytes` is the GPU memory that training takes besides passes, optimizer and exchange between processes.
    """

    padding_free = False
    tells_time = True  # a step is timed also where there is nothing to choose

    def __init__(self, model: Any, run: StageContext[S], other_bytes: int = 0):
        self.model, self.run = model, run
        self.device = next(model.parameters()).device
        counts = count_weights(
            model.config, target_modules=run.settings.target_modules, r=run.settings.lora_r, vocabulary=None
        )
        # Training adds to a pass: the optimizer's state, and the gradients that processes exchange.
        self.other_bytes = other_bytes + (4 * counts.trained if process_count() > 1 else 0)
        self.other_bytes += 0 if "paged" in run.settings.optim else optimizer_bytes(counts, run.settings.optim)

    @abstractmethod
    def longest(self, size: int) -> Any:
        """A batch of `size` samples of the greatest possible length."""

    @abstractmethod
    def typical(self, size: int) -> list[Any]:
        """A few batches of `size` samples in training order."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens of a batch, to compare batches by."""

    @abstractmethod
    def tokens_per_step(self, plan: BatchPlan) -> float:
        """Tokens of a step of this process."""

    @abstractmethod
    def loss(self, batch: Any) -> torch.Tensor:
        """The forward pass."""

    def fits(self, size: int, passes: int, must: bool = False) -> tuple[int | None, bool]:
        """GPU memory in bytes of passes of `size` of the longest rows, and whether all processes have it.

        `passes` are those of a step: in the second one, the gradients of the first stand beside the activations. With
        `must`, a process without the memory raises its error.
        """
        import torch

        self.release()
        torch.cuda.reset_peak_memory_stats()
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        peak: int | None = None
        try:
            self.passes([self.longest(size)] * min(passes, 2))
            peak = torch.cuda.max_memory_allocated() + self.other_bytes
        except RuntimeError as error:
            if not is_out_of_memory(error) or must:
                raise
        self.release()
        does_fit = must or (peak is not None and peak <= FILLED * room)
        return peak, not agree(int(not does_fit))[0]

    def seconds_per_step(self, plan: BatchPlan) -> float:
        """Seconds of all passes of a step in this process, without the optimizer."""
        if self.device.type == "cuda":
            batches = self.typical(plan.micro_batch_size)
            self.passes(batches)  # kernels are compiled for new lengths
            timed = batches[1:] or batches
        else:
            timed = self.typical(1)[:1]  # on a CPU the time per token does not depend on the batch size
        # The first round is slower: a process warms up, and a GPU's memory is divided as it is needed.
        seconds = min(self.passes(timed) for _ in range(TIMED_ROUNDS))
        self.release()
        return seconds * self.tokens_per_step(plan) / sum(map(self.tokens, timed))

    def passes(self, batches: Sequence[Any]) -> float:
        """Seconds of forward and backward passes of batches; gradients add up, random states are restored."""
        import torch

        precision, cuda = self.run.precision, self.device.type == "cuda"
        mixed = cuda and precision.dtype != "float32"
        self.model.train()
        with torch.random.fork_rng([self.device] if cuda else []):
            begin = synchronised_time()
            for batch in batches:
                with torch.autocast("cuda", precision.torch_dtype) if mixed else nullcontext():
                    loss = self.loss(batch)
                loss.backward()
            return synchronised_time() - begin

    def release(self) -> None:
        """Free the gradients, and on CUDA the memory that the allocator caches."""
        from accelerate.utils.memory import clear_device_cache

        for parameter in self.model.parameters():
            parameter.grad = None
        clear_device_cache(garbage_collection=True)  # a pass that ran out of memory may leave cycles with activations


class SupervisedTrial(Trial[SupervisedSettings]):
    """Passes of a supervised stage. `order` are row numbers in training order; the first are timed."""

    def __init__(
        self, model: Any, run: StageContext[SupervisedSettings], samples: TrainingSamples,
        collator: InputMaskingDataCollator, order: Sequence[int],
    ):  # fmt: skip
        super().__init__(model, run)
        self.samples, self.collator, self.order = samples, collator, order
        self.padding_free = collator.packed_for is not None

    def longest(self, size: int) -> Batch:
        """A batch of random rows as long as the longest sample."""
        tokens = min(self.run.settings.max_seq_length, int(self.samples.lengths().max()))
        row = uniform_row(tokens, self.collator.mask_first_n_examples, self.model.config.vocab_size)
        return self.collator([row] * size)

    def typical(self, size: int) -> list[Batch]:
        """The first batches."""
        batches = [self.order[at * size : (at + 1) * size] for at in range(1 + TIMED_BATCHES)]
        batches = [rows for rows in batches if len(rows) == size] or [self.order[:1]]
        return [self.collator(self.samples.__getitems__(list(rows))) for rows in batches]

    def tokens(self, batch: Batch) -> int:
        """Tokens without padding."""
        mask = batch.get("attention_mask")
        return int((batch["input_ids"] != self.collator.tokenizer.pad_token_id if mask is None else mask).sum())

    def tokens_per_step(self, plan: BatchPlan) -> float:
        """The mean over the samples."""
        return float(self.samples.lengths().mean()) * plan.micro_batch_size * plan.passes

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's loss, called with a trainer's keywords: other keywords would make its layers compile again."""
        from accelerate.utils import send_to_device

        batch = {**send_to_device(batch, self.device), "use_cache": False}
        if self.run.precision.engine == "transformers":
            batch["num_items_in_batch"] = (batch["labels"] != IGNORE_INDEX).sum()
        return self.model(**batch).loss


def synchronised_time() -> float:
    """The time in seconds, after all work that the device was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def uniform_row(tokens: int, masked_replies: int, vocabulary: int) -> dict[str, Any]:
    """A row of random tokens, all learned except those of the masked replies; to measure the memory of a length."""
    bounds = np.arange(masked_replies + 1)
    spans = np.stack([bounds, np.append(bounds[1:], tokens)], axis=1)
    return {"input_ids": np.random.default_rng(0).integers(0, vocabulary, tokens), "reply_spans": spans}
