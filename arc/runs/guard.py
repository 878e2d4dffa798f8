"""A guard for a trainer: checkpoints by time, stop signals, and losses that are no numbers."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from arc.runs.checkpoints import checkpoint_folder, delete_older, mark_complete
from arc.runs.processes import agree, is_main, wait_for_everyone
from arc.runs.signals import StopSignals
from arc.runs.troubles import NonFiniteError
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
    from transformers import TrainerCallback

    trainer.args.logging_nan_inf_filter = False
    spare_workers(trainer)
    saves = save_seconds is not None or trainer.args.save_strategy != "no"
    signals.saves = saves

    class Guard(TrainerCallback):
        """See `guard`."""

        def __init__(self) -> None:
            self.saved_at = time.monotonic()
            self.wanted = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved_at = time.monotonic()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            # The trainer logs before it saves.
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(float(loss)):
                raise NonFiniteError(f"the loss is {float(loss)}", state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The last callback, so that it sees and overrules what the default ones decided about saving.
            last = state.global_step >= state.max_steps
            allowed = last or state.global_step % steps_between_saves_multiple == 0
            stopping = signals.agree()
            if saves:
                late = save_seconds is not None and time.monotonic() - self.saved_at >= save_seconds
                late = bool(agree(late and is_main())[0])  # all save at the same step: by one clock
                self.wanted = self.wanted or control.should_save or late or stopping or last
                control.should_save = self.wanted and allowed
            if stopping and (allowed or not saves):
                control.should_training_stop = True
                if not last:  # who sends SIGTERM often kills soon after: the checkpoint comes first
                    control.should_evaluate = False
            if control.should_save or control.should_training_stop:
                check_weights_are_finite(trainer.model, state.global_step)
            if control.should_save:
                # What a killed run left under that name is no part of what is written now.
                if is_main():
                    shutil.rmtree(checkpoint_folder(args, state), ignore_errors=True)
                wait_for_everyone()  # each process writes a file into it

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved_at, self.wanted = time.monotonic(), False
            wait_for_everyone()  # until the files of all are there
            if not args.should_save:  # another process of a distributed run does
                return
            mark_complete(checkpoint_folder(args, state))
            if keep is not None:
                delete_older(Path(args.output_dir), keep)

    trainer.add_callback(Guard())


def check_weights_are_finite(model: Any, step: int) -> None:
    """Look at all trainable weights of a model.

    Raises:
        NonFiniteError: one is infinite or no number; names the first.
    """
    import torch

    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        bad = [name for name, parameter in trainable if not torch.isfinite(parameter).all()]
    if bad:
        raise NonFiniteError(f"weights are not finite ({len(bad)} of {len(trainable)} matrices, {bad[0]})", step)
