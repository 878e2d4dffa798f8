"""The callback of `guard.guard`. Imported when a trainer is guarded: transformers' base class is slow to load."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from arc.runs.checkpoints import checkpoint_folder, delete_older, mark_complete
from arc.runs.processes import agree, is_main, wait_for_everyone
from arc.runs.signals import StopSignals
from arc.runs.troubles import NonFiniteError

STATE = "run guard"  # its entry among the callbacks' states in trainer_state.json


class Guard(TrainerCallback):
    """Saves by time and on signals, checks for NaN, marks checkpoints, records who ended the training: see `guard`.

    It has to be the last callback: it sees what the others decided, and overrules when they save.

    Args:
        trainer, signals, save_seconds, steps_between_saves_multiple, keep: as of `guard`.
    """

    def __init__(
        self,
        trainer: Any,
        signals: StopSignals,
        save_seconds: float | None,
        steps_between_saves_multiple: int,
        keep: int | None,
    ) -> None:
        self.trainer, self.signals, self.save_seconds = trainer, signals, save_seconds
        self.multiple, self.keep = steps_between_saves_multiple, keep
        self.saves = signals.saves = save_seconds is not None or trainer.args.save_strategy != "no"
        self.saved_at = time.monotonic()
        self.wanted = False  # a save is due at the next step that allows one
        self.stopped = False  # the training stops on a signal, or another callback has ended it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save and to stop."""
        self._record_end(state, control)
        last = state.global_step >= state.max_steps
        allowed = last or state.global_step % self.multiple == 0
        stopping = self.signals.agree()
        if self.saves:
            late = self.save_seconds is not None and time.monotonic() - self.saved_at >= self.save_seconds
            late = bool(agree(late and is_main())[0])  # all save at the same step: by one clock
            self.wanted = self.wanted or control.should_save or late or stopping or last
            # No run continues from the checkpoint of a training that was ended: it may be of any step.
            control.should_save = self.wanted and (allowed or self.stopped)
        if stopping and (allowed or not self.saves):
            control.should_training_stop = self.stopped = True
            if not last:  # who sends SIGTERM often kills soon after: the checkpoint comes first
                control.should_evaluate = False
        if control.should_save or control.should_training_stop:
            check_weights_are_finite(self.trainer.model, state.global_step)
        if control.should_save:
            _make_room(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Refuse a loss that is not finite: the trainer logs before it saves."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}", state.global_step)
        self._save_if_ended(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save if a callback ended the training because of a measurement."""
        self._save_if_ended(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save if a callback ended the training between two steps."""
        self._save_if_ended(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete and delete older ones."""
        self.saved_at, self.wanted = time.monotonic(), False
        ended = self._record_end(state, control)  # by a callback that looked at the checkpoint
        wait_for_everyone()  # until the files of all are there
        if not args.should_save:  # another process of a distributed run does
            return
        folder = checkpoint_folder(args, state)
        if ended:
            state.save_to_json(str(folder / "trainer_state.json"))
        mark_complete(folder)
        if self.keep is not None:
            delete_older(Path(args.output_dir), self.keep)

    def _record_end(self, state: Any, control: Any) -> bool:
        # Whether another callback has ended the training since the last look; the next checkpoint says so.
        if self.stopped or not control.should_training_stop or state.global_step >= state.max_steps:
            return False
        self.stopped = self.wanted = True
        state.stateful_callbacks[STATE] = {"reason": f"a callback ended the training at step {state.global_step}"}
        return True

    def _save_if_ended(self, args: Any, state: Any, control: Any) -> None:
        if self._record_end(state, control) and self.saves:
            check_weights_are_finite(self.trainer.model, state.global_step)
            control.should_save = True
            _make_room(args, state)


def _make_room(args: Any, state: Any) -> None:
    # What a killed run left under the checkpoint's name is no part of what is written now.
    if is_main():
        shutil.rmtree(checkpoint_folder(args, state), ignore_errors=True)
    wait_for_everyone()  # each process writes a file into it


def check_weights_are_finite(model: Any, step: int) -> None:
    """Look at all trainable weights of a model.

    Raises:
        NonFiniteError: one is infinite or no number; names the first.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        bad = [name for name, parameter in trainable if not torch.isfinite(parameter).all()]
    if bad:
        raise NonFiniteError(f"weights are not finite ({len(bad)} of {len(trainable)} matrices, {bad[0]})", step)
