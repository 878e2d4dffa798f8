"""A guard for a trainer: checkpoints by time, stop signals, and losses that are no numbers."""

from __future__ import annotations

import math
from typing import Any

from arc.runs.signals import StopSignals
from arc.runs.workers import spare_workers


def generation_steps(arguments: Any) -> int:
    """Optimizer steps after which trl's GRPOTrainer makes new completions; other trainers': 1.

    Between two such steps it works through a buffer that a checkpoint does not hold, so a run that continues from there
    would not repeat the uninterrupted one.

    Args:
        arguments: of any trainer.
    """
    accumulation = arguments.gradient_accumulation_steps
    forward_passes = getattr(arguments, "steps_per_generation", None) or accumulation
    forward_passes *= getattr(arguments, "num_iterations", 1)
    return math.lcm(forward_passes, accumulation) // accumulation if hasattr(arguments, "num_iterations") else 1


def guard(
    trainer: Any,
    *,
    signals: StopSignals,
    save_seconds: float | None,
    steps_between_saves_multiple: int = 1,
    keep: int | None = None,
) -> None:
    """Add to a trainer what keeps its work: saves by time and on signals, a check for NaN, marks on checkpoints.

    Saving changes nothing of the training: a run that was stopped and continued ends in the same weights, bit for bit.
    A loss or a trainable weight that is not finite ends the training with NonFiniteError before it is saved; infinite
    gradients are no error, because float16's loss scaling meets some and skips those steps.

    Where another callback ends the training, the checkpoint of that step records it: the next start does not train on.

    Args:
        trainer: any transformers or trl trainer, before `train`. Its `args.logging_nan_inf_filter` is set to False: it
            would log the mean of earlier losses for one that is not finite.
        signals: when one is received, the training saves a checkpoint and stops.
        save_seconds: save whenever this much time has passed since the last checkpoint, and at the last step. None:
            saves are the trainer's own (`save_strategy`, `save_steps`); with save_strategy "no" there are none at all.
        steps_between_saves_multiple: save at multiples of this many steps only, and at the last one; a save that falls
            between, and a stop, are put off to the next multiple. See `generation_steps`.
        keep: complete checkpoints to keep; older ones are deleted when a newer one is complete. None: left to the
            trainer (its `save_total_limit`), which deletes the older one first: with a limit of 1, a crash just then
            leaves nothing.
    """
    from arc.runs.guard_callback import Guard

    trainer.args.logging_nan_inf_filter = False
    spare_workers(trainer)
    trainer.add_callback(Guard(trainer, signals, save_seconds, steps_between_saves_multiple, keep))
