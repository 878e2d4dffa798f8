"""What keeps a run's work when something goes wrong: signals, losses that are no numbers, full disks, little memory.

A checkpoint counts only when it is whole: a file in it, written last, names every other file with its size.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

MARKER = "complete.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class NonFiniteError(ArithmeticError):
    """A loss or a weight is not a number any more; the message names the step."""


class StopSignals:
    """Notes the first SIGTERM or SIGINT, so that a training can save and stop; a second one acts at once.

    Attributes:
        received: the signal, or None.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        """See the class."""
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take over both signals; outside the main thread, where Python allows none, do nothing."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self.NUMBERS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(
            2, f"\n{self.received.name}: stopping after this step, with a checkpoint; once more: at once\n".encode()
        )


def steps_between_saves(arguments: Any) -> int:
    """After how many optimizer steps a trainer is in a state that it can continue from exactly.

    trl's GRPOTrainer samples completions for several steps at once and cannot be continued in the middle of them.

    Args:
        arguments: of any trainer.
    """
    per_generation = getattr(arguments, "steps_per_generation", None)
    if not per_generation:
        return 1
    passes = per_generation * getattr(arguments, "num_iterations", 1)
    return max(1, math.lcm(passes, arguments.gradient_accumulation_steps) // arguments.gradient_accumulation_steps)


def guard(trainer: Any, *, signals: StopSignals, save_seconds: float | None) -> None:
    """Make a trainer save by the clock and on signals, and refuse to go on with, or to save, what is not a number.

    Args:
        trainer: any trainer of transformers; its arguments should have `save_strategy="steps"` (also where the clock
            decides, with a `save_steps` that is never reached: then it saves at its last step too) and
            `logging_nan_inf_filter=False` (the filter hides losses that are not finite).
        signals: whose `received` ends the training after a checkpoint.
        save_seconds: seconds of work between checkpoints; None: only where `save_steps` says so.
    """
    import torch
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        """See `guard`."""

        def __init__(self) -> None:
            self.saved = time.monotonic()
            self.every = steps_between_saves(trainer.args)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % self.every == 0:
                if save_seconds is not None and time.monotonic() - self.saved >= save_seconds:
                    control.should_save = True
                if signals.received is not None:
                    control.should_save = args.save_strategy != "no"
                    control.should_training_stop = True
            if control.should_save:
                self.check_weights(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(float(loss)):
                raise NonFiniteError(f"the loss is {float(loss)} at step {state.global_step}")

        def check_weights(self, step: int) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                    raise NonFiniteError(f"the weight {name} is not finite at step {step}")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self.saved = time.monotonic()

    trainer.add_callback(Guard())  # last: after the callback that decides to save, before the trainer does


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint to the disk and leave the file in it that says it is whole."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        _flush(path)
    beside = checkpoint / f"{MARKER}.tmp"
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    beside.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    _flush(beside)
    beside.replace(checkpoint / MARKER)
    _flush(checkpoint)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot flush folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, newest first; others are named in a printed note."""
    found, broken = [], []
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and path.name[11:].isdigit():
            (found if _is_whole(path) else broken).append(path)
    for path in broken:
        print(f"note: {path} is not whole (the run was killed while it was written): not used")
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def refuse_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files hold anything but tensors and plain values.

    Raises:
        ValueError: one of them would run code when it is loaded.
    """
    import pickle

    import torch

    for path in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("rng_state*.pth")):
        try:
            with torch.serialization.safe_globals(_random_state_types()):
                torch.load(path, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{path} holds more than tensors and could run code when it is loaded ({reason[:120]}): it was not "
                f"written by this pipeline; move {checkpoint} away"
            ) from None


def _random_state_types() -> list[Any]:
    # What numpy's random state is made of, as transformers allows it too.
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@contextlib.contextmanager
def machine_errors(
    doing: str, settings: Any, folder: Path, *, last_checkpoint: Callable[[], Path | None] = lambda: None
) -> Iterator[None]:
    """Turn trouble of the machine (memory, disk) and losses that are no numbers into one message and exit code 1.

    Where ARC_TRACEBACK is set in the environment, the traceback stays.

    Args:
        doing: what is being done, for the message ("training", "merging").
        settings: of the run; their present values stand in the advice.
        folder: where it writes.
        last_checkpoint: gives the newest whole checkpoint, to be named.
    """
    try:
        yield
    except Exception as error:
        message = explain(error, doing, settings, folder)
        if message is None or os.environ.get("ARC_TRACEBACK"):
            raise
        checkpoint = last_checkpoint()
        kept = f"\nThe last whole checkpoint is {checkpoint}: the same command continues from it." if checkpoint else ""
        print(f"error: {message}\nFinished artifacts are as they were.{kept}", file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException, doing: str, settings: Any, folder: Path) -> str | None:
    """What went wrong and what to do, if it is trouble of the machine or a loss that is no number; else None."""
    if isinstance(error, NonFiniteError):
        half = f", or --dtype other than {settings.dtype}" if settings.dtype == "float16" else ""
        return (
            f"{doing} stopped: {error}. Lower --learning_rate (now {settings.learning_rate:g}) or --max_grad_norm (now "
            f"{settings.max_grad_norm:g}){half}; --overwrite moves the checkpoints of the old settings aside"
        )
    if _is_out_of_memory(error):
        return f"out of memory while {doing} ({_first_line(error)}).\n{lower_memory(settings, _in_evaluation(error))}"
    number = _disk_error(error)
    if number in NO_ROOM:
        free = shutil.disk_usage(_existing(folder)).free
        return (
            f"the disk of {folder} is full while {doing} ({_first_line(error)}): {free / 2**30:.1f} GiB are free. Make "
            "room, or use another --output_dir, or lower --save_total_limit"
        )
    if number in NOT_ALLOWED:
        return f"{folder} cannot be written to while {doing} ({_first_line(error)})"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _in_evaluation(error: BaseException) -> bool:
    # Whether it happened while held-out puzzles were measured or decoded.
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name in ("evaluation_loop", "evaluate", "exact_match", "generate_replies"):
            return True
        trace = trace.tb_next
    return False


def lower_memory(settings: Any, evaluating: bool = False) -> str:
    """Which settings to lower, in order, with their present values."""
    if evaluating:
        return f"Lower --per_device_eval_batch_size (now {settings.per_device_eval_batch_size})."
    batch, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    advice = []
    if batch > 1:
        advice.append(
            f"--per_device_train_batch_size (now {batch}), raising --gradient_accumulation_steps (now {accumulated}) "
            "by the same factor, which gives the same training"
        )
    if not settings.gradient_checkpointing:
        advice.append("--gradient_checkpointing true")
    advice.append(f"--max_seq_length (now {settings.max_seq_length})")
    if hasattr(settings, "num_generations"):
        advice.append(f"--num_generations (now {settings.num_generations})")
    advice.append(f"--lora_r (now {settings.lora_r})")
    return "Lower, in this order: " + "; ".join(advice) + "."


def _disk_error(error: BaseException) -> int | None:
    # The errno of trouble with the disk, also where a library has wrapped it in an error of its own.
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    for number in NO_ROOM + NOT_ALLOWED:
        if f"os error {number})" in text:  # safetensors, written in Rust
            return number
    if type(error).__name__ == "RuntimeError" and ("PytorchStreamWriter failed" in text or "inline_container" in text):
        return errno.ENOSPC  # torch.save hides the cause: nearly always a full disk
    for cause in (error.__cause__, error.__context__):
        if cause is not None:
            return _disk_error(cause)
    return None
