"""What keeps a run's work when something goes wrong: checkpoints, stop signals, NaN, full disks, too little memory.

Before the work, `find_shortages` compares what a run needs at least with what is free. During the training, `guard`
saves by time and on a stop signal, lets no checkpoint with a weight that is no number be written, and marks a
checkpoint as complete when it has reached the disk. Around all of it, `machine_errors` turns trouble of the machine
into one message that names what to lower and what is safe.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from arc.runs.processes import agree, fail, is_main, wait_for_everyone

MARKER = "complete.json"  # in a checkpoint: the size in bytes of each of its files
SAME_SIGNAL = 1.0  # seconds in which a second signal is the first one's copy: `timeout` and wrappers send it twice
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class NonFiniteError(ArithmeticError):
    """A loss or a weight is infinite or no number; what was learned is lost, what was saved before is not.

    Args:
        what: what is not finite.
        step: the optimizer step after which it was seen.
    """

    def __init__(self, what: str, step: int):
        """See the class."""
        super().__init__(f"{what} after step {step}")
        self.step = step


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignals:
    """Context manager: SIGTERM and SIGINT are noted, to stop at a good place; a second one acts at once.

    Meant to be put around the training only, since nothing else looks at what was noted. Does nothing outside the main
    thread, and leaves a signal alone that this process was told to ignore.

    Attributes:
        received: the first signal, or None.
        saves: whether whoever stops will save a checkpoint first; for the printed line. `guard` sets it.
    """

    def __init__(self) -> None:
        """See the class."""
        self.received: signal.Signals | None = None
        self.saves = True
        self._received_at = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's to restore
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which a terminal interrupts too: its parent decides
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if not is_main():  # a launcher tells all its processes, and one of them says so
                return
            how = "with a checkpoint" if self.saves else "without a checkpoint (they are off)"
            # Not print: the signal may have come in the middle of one, and streams are not to be entered twice.
            with contextlib.suppress(OSError):
                name = self.received.name
                os.write(2, f"{name}: stopping after this step, {how}; once more: at once\n".encode())
        elif now - self._received_at > SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(number)

    def agree(self) -> bool:
        """Whether a signal was received by any of the processes that work together; all note it then."""
        [number] = agree(int(self.received or 0))
        if number and self.received is None:
            self.received = signal.Signals(number)
        return self.received is not None

    def end_if_received(self, folder: str | Path) -> None:
        """After the training: end the program if it was stopped, as a program does that a signal ended.

        Args:
            folder: of the checkpoints; the newest is named.

        Raises:
            SystemExit: with 128 + the signal's number (143 for SIGTERM, 130 for SIGINT).
        """
        if self.received is None:
            return
        kept = complete_checkpoints(folder, quiet=True)
        advice = f"the same command continues from {kept[0]}" if kept else "no checkpoint was written"
        fail(f"{self.received.name}: stopped; {advice}", 128 + self.received)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


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
    _spare_workers(trainer)
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


def _spare_workers(trainer: Any) -> None:
    # Processes that make batches: a signal to the whole group is for the one that trains, which ends them in order.
    make = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = make()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wraps PyTorch's
        if inner.num_workers:
            inner.worker_init_fn = leaving_signals(inner.worker_init_fn)
        return loader

    trainer.get_train_dataloader = get_train_dataloader


def leaving_signals(begin: Callable[[int], Any] | None = None) -> Callable[[int], None]:
    """The worker_init_fn of a loader whose processes leave signals to this one, and end with it.

    Args:
        begin: what each does then, if anything.
    """
    _end_workers_at_exit()
    return partial(begin_worker, begin)


@functools.cache
def _end_workers_at_exit() -> None:
    # At exit multiprocessing sends SIGTERM to daemons, as loaders' processes are, and waits for ever for those that
    # leave it to others. An error that nothing catches keeps their loader until then.
    @atexit.register
    def end() -> None:
        # PyTorch's handler raises for the first process that is killed, here of all places: the others would live on.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


def begin_worker(begin: Callable[[int], Any] | None, number: int) -> None:
    """What a process that makes batches does first: it leaves signals to the one that trains.

    Args:
        begin: what it does then, if anything.
        number: of the process.
    """
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    if begin is not None:
        begin(number)


def checkpoint_folder(arguments: Any, state: Any) -> Path:
    """The folder that a trainer writes its checkpoint of the present step into."""
    return Path(arguments.output_dir) / f"checkpoint-{state.global_step}"


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


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to the disk, then write the marker that names each with its size, in one move."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, f"{MARKER}.tmp"))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    beside = folder / f"{MARKER}.tmp"
    beside.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    flush(beside)
    beside.replace(folder / MARKER)
    flush(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Make sure that a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot flush folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def complete_checkpoints(folder: str | Path, quiet: bool = False) -> list[Path]:
    """The checkpoints of a folder that are whole, newest first.

    A checkpoint is whole if its marker is there and every file that it names has the size that it had. The others are
    named in one printed note, unless `quiet`.
    """
    found = {int(m[1]): p for p in Path(folder).glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(p.name))}
    whole = {step: path for step, path in found.items() if _is_whole(path)}
    partial = [found[step].name for step in sorted(found.keys() - whole.keys())]
    if partial and not quiet:
        are = "are" if len(partial) > 1 else "is"
        print(f"note: {', '.join(partial)} {are} not whole (killed while it was written or deleted): not used")
    return [whole[step] for step in sorted(whole, reverse=True)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # missing, cut off, or not a table of sizes
        return False


def refuse_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files hold anything but tensors and plain values.

    transformers does not unpickle other things either; this says so before a model is loaded, and in one sentence.

    Raises:
        ValueError: one of the files would run code when it is loaded, or cannot be read.
    """
    import pickle

    import numpy as np
    import torch

    # What numpy's random state is made of; transformers allows it too.
    allowed = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    for path in (*sorted(checkpoint.glob("*.pt")), *sorted(checkpoint.glob("*.pth"))):
        try:
            with torch.serialization.safe_globals(allowed):
                torch.load(path, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} holds more than tensors and plain values, or is no checkpoint's file, and is not loaded "
                f"({str(error).strip().splitlines()[0][:120]}): move {checkpoint} away"
            ) from None


def delete_older(folder: Path, keep: int | None = None) -> None:
    """Delete checkpoints that are older than the newest whole one.

    Args:
        folder: of the checkpoints.
        keep: whole ones to keep. None: all, only what is left of others goes, by a run that was killed while it wrote
            or deleted one.
    """
    kept = complete_checkpoints(folder, quiet=True)[:keep]
    newest = int(CHECKPOINT.fullmatch(kept[0].name)[1]) if kept else -1
    for path in folder.glob("checkpoint-*"):
        number = CHECKPOINT.fullmatch(path.name)
        if number and path not in kept and int(number[1]) < newest:
            (path / MARKER).unlink(missing_ok=True)  # first: what is left of it, if this is interrupted, is not whole
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Trouble of the machine

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Allocators of CUDA, cuBLAS and the CPU say it in different words and types.
NO_MEMORY = re.compile(
    r"CUDA\b.{0,16}out of memory|CUBLAS_STATUS_ALLOC_FAILED|[Cc]an't allocate memory"  # of torch, the driver, Triton
    r"|Cannot allocate memory"
)
# What torch.save makes of a write that failed: the zip file's writer, or C++'s stream under it.
TORCH_WRITE = re.compile(r"PytorchStreamWriter failed|enforce fail at inline_container|basic_ios::clear|iostream error")
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers, written in Rust, end their messages
# A process that makes batches is gone: the kernel ended it to free memory, or it got a signal that was meant for all.
WORKER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)", re.DOTALL)
# A process that works on the same run is gone: gloo and NCCL tell the others so when they wait for it.
PEER_ENDED = re.compile(r"Connection (closed|reset) by peer|remote process exited or there was a network error")
# Functions that measure on held-out puzzles.
MEASURING = ("evaluate", "evaluation_loop", "exact_match", "greedy_answers")


@contextlib.contextmanager
def machine_errors(
    doing: str,
    settings: Mapping[str, Any],
    *,
    folder: str | Path,
    checkpoint: Callable[[], Path | None] = lambda: None,
    artifacts: Sequence[str | Path] = (),
    measuring: Sequence[str] = MEASURING,
) -> Iterator[None]:
    """Turn trouble of the machine (memory, disk, permissions, NaN) into one message and exit code 1.

    All else passes through untouched, and so does the trouble where ARC_TRACEBACK is set in the environment.

    Args:
        doing: what the block does, to be read after "while": "training", "merging".
        settings: names and present values, from which to advise; empty where none of them helps, as in a merge.
        folder: what is written to; the file system whose free space is told.
        checkpoint: gives the newest complete checkpoint, if there is one; called only when something is wrong.
        artifacts: folders that may be finished by then; those that are there are named.
        measuring: names of functions that measure on held-out puzzles: memory that ran out inside one of them is
            theirs, and another setting helps.
    """
    try:
        yield
    except Exception as error:
        trouble = explain(error, doing, settings, folder, measuring)
        if trouble is None or os.environ.get("ARC_TRACEBACK"):
            raise
        newest = checkpoint()
        lines = [f"error: {trouble}"]
        if newest is not None:
            lines.append(f"The last good checkpoint is {newest}.")
        elif settings:
            lines.append("No checkpoint was written before.")
        finished = [str(path) for path in artifacts if Path(path).exists()]
        if finished:
            lines.append(f"Finished, and not touched: {', '.join(finished)}.")
        fail("\n".join(lines), 1)


def explain(
    error: BaseException,
    doing: str,
    settings: Mapping[str, Any],
    folder: str | Path,
    measuring: Sequence[str] = MEASURING,
) -> str | None:
    """What trouble of the machine an error is and what to do about it, as text; None if it is none.

    Args:
        error, doing, settings, folder, measuring: see `machine_errors`.
    """
    if isinstance(error, NonFiniteError):
        return _explain_numbers(error, doing, settings)
    if is_out_of_memory(error):
        return _explain_memory(error, doing, settings, _was_inside(error, measuring))
    if isinstance(error, RuntimeError) and WORKER_ENDED.search(str(error)):
        workers = settings.get("dataloader_num_workers", "more than 0")
        return (
            f"a process that makes batches was ended while {doing}, by a signal or for lack of main memory "
            f"({_first_line(error)}).\nRun the command again, with fewer --dataloader_num_workers (now {workers})."
        )
    if isinstance(error, RuntimeError) and PEER_ENDED.search(str(error)):
        return (
            f"another process of this run was ended while {doing}, by a signal or for lack of main memory.\nRun the "
            "command again."
        )
    if (number := _disk_error_number(error)) is not None:
        return _explain_disk(error, number, doing, Path(folder))
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in the words of any allocator."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError is a RuntimeError, and its message says so; torch need not be imported to know it.
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def _was_inside(error: BaseException, names: Sequence[str]) -> bool:
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_name in names:
            return True
        step = step.tb_next
    return False


def _disk_error_number(error: BaseException) -> int | None:
    """The errno of trouble with writing; 0 if it is that and the number is not known; None for any other error."""
    if isinstance(error, OSError):
        return error.errno if error.errno in OUT_OF_SPACE | NOT_ALLOWED else None
    text = str(error)
    if match := OS_ERROR.search(text):
        return int(match[1]) if int(match[1]) in OUT_OF_SPACE | NOT_ALLOWED else None
    if isinstance(error, RuntimeError) and TORCH_WRITE.search(text):
        named = (number for number in OUT_OF_SPACE | NOT_ALLOWED if os.strerror(number) in text)
        return next(named, 0)
    return None


def _explain_numbers(error: NonFiniteError, doing: str, settings: Mapping[str, Any]) -> str:
    lower = [f"--{name} (now {settings[name]})" for name in ("learning_rate", "max_grad_norm") if name in settings]
    text = f"{error}, while {doing}: nothing was saved from then on."
    if error.step == 0:
        return f"{text}\nNothing was learned yet: it is the model that the training starts from."
    if lower:
        text += f"\nLower {' or '.join(lower)}; that is another training, which starts anew."
    if settings.get("dtype") == "float16":
        text += "\nThe arithmetic is float16, which overflows above 65504: --dtype bfloat16 or float32 does not."
    return text


def _explain_memory(error: BaseException, doing: str, settings: Mapping[str, Any], measuring: bool) -> str:
    text = f"out of memory while {'measuring held-out puzzles' if measuring else doing} ({_first_line(error)})."
    advice = []
    if measuring and settings.get("per_device_eval_batch_size", 1) > 1:
        advice.append(f"--per_device_eval_batch_size (now {settings['per_device_eval_batch_size']}): the same results")
    if not measuring:
        advice += _memory_advice(settings)
    if not advice:
        return f"{text}\nEnd what else uses the memory, then run the same command again."
    return "\n".join([f"{text}\nLower what comes first here, and run the command again:", *(f"  {x}" for x in advice)])


def _memory_advice(settings: Mapping[str, Any]) -> list[str]:
    size = settings.get("micro_batch_size") or settings.get("per_device_train_batch_size", 1)
    advice = []
    if size > 1:
        lower = next(part for part in range(size // 2, 0, -1) if size % part == 0)
        advice.append(f"--micro_batch_size {lower} (now {size}): the same result")
    if settings.get("gradient_checkpointing") is False:
        advice.append("--gradient_checkpointing true (now false): the same result, slower")
    for name in ("max_seq_length", "num_generations", "lora_r"):
        if name in settings:
            advice.append(f"--{name} (now {settings[name]}): another training")
    return advice


def _explain_disk(error: BaseException, number: int, doing: str, folder: Path) -> str:
    path = getattr(error, "filename", None) or folder
    text = f"cannot write {path} while {doing} ({_first_line(error)})."
    if number in NOT_ALLOWED:
        return f"{text}\nSee who owns {path} and whether it may be written to, then run the same command again."
    place = _nearest_existing(folder)
    return (
        f"{text}\nThe file system of {place} has {_in_units(shutil.disk_usage(place).free)} free: make room (or raise "
        "the quota or limit on file sizes), then run the same command again."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run needs


@dataclass(frozen=True)
class WeightCounts:
    """Weights of a model and of the LoRA on it, as numbers of elements.

    Attributes:
        linear: of the linear layers, the head left out: what 4-bit loading quantises.
        embeddings: of embed_tokens and lm_head, once where they are tied.
        other: norms and the like.
        lora: of the LoRA matrices.
        full_embeddings, full_head: of embed_tokens and lm_head where they are trained in full.
        saved: of what an adapter's file holds: the trained ones, and a second copy of a shared matrix (peft's doing).
        rank: LoRA's, for messages.
    """

    linear: int
    embeddings: int
    other: int
    lora: int
    full_embeddings: int
    full_head: int
    saved: int
    rank: int

    @property
    def model(self) -> int:
        """All weights of the model without LoRA."""
        return self.linear + self.embeddings + self.other

    @property
    def trained(self) -> int:
        """All trainable weights."""
        return self.lora + self.full_embeddings + self.full_head


@dataclass(frozen=True)
class Need:
    """Bytes that some work needs at least.

    Attributes:
        doing: the work: "training", "merging", "writing".
        kind: "memory" or "disk".
        parts: bytes by what they are for.
        remedies: what makes it less, best first.
    """

    doing: str
    kind: str
    parts: dict[str, int]
    remedies: tuple[str, ...]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Free:
    """Bytes that are free.

    Attributes:
        disk: on the file system that is written to.
        memory: where the model goes.
        place: what is written to, for messages.
        memory_name: "GPU memory" or "main memory".
    """

    disk: int
    memory: int
    place: str
    memory_name: str


def count_weights(config: Any, *, target_modules: Sequence[str], r: int, vocabulary: int | None = None) -> WeightCounts:
    """Count the weights that a transformers configuration asks for, without making them.

    Args:
        config: of the base model.
        target_modules: as `model_tools.add_lora` takes them; embed_tokens and lm_head are trained in full, as one
            shared matrix where the model is tied.
        r: LoRA's rank.
        vocabulary: tokens that the base will have when it is prepared; default: those of the configuration.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if vocabulary is not None:
        config.vocab_size = vocabulary
        # Token numbers above the cut vocabulary mean nothing here, and an embedding refuses such a padding number.
        config.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding is head
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    }
    linear = sum(module.weight.numel() for module in layers.values())
    embeddings = embedding.numel() + (0 if tied else head.numel())
    total = sum(parameter.numel() for parameter in model.parameters())
    targets = [module for name, module in layers.items() if name.rpartition(".")[2] in target_modules]
    lora = sum(r * (module.in_features + module.out_features) for module in targets)
    full = {"embed_tokens", "lm_head"} & set(target_modules)
    full_embeddings = embedding.numel() if "embed_tokens" in full or (tied and full) else 0
    full_head = head.numel() if "lm_head" in full and not tied else 0
    return WeightCounts(
        linear=linear,
        embeddings=embeddings,
        other=total - linear - embeddings,
        lora=lora,
        full_embeddings=full_embeddings,
        full_head=full_head,
        saved=lora + full_head + full_embeddings * (2 if tied else 1),
        rank=r,
    )


def optimizer_bytes(counts: WeightCounts, optim: str) -> int:
    """Bytes of an optimizer's state; an embedding's stays in 32 bits in the 8-bit ones, see bitsandbytes."""
    if optim == "muon":  # one of LoRA's matrices, Adam's two of the rest
        return 4 * (counts.trained + counts.full_embeddings + counts.full_head)
    states = 1 if "lion" in optim else 2 if "adam" in optim or "ademamix" in optim else 0
    if "8bit" in optim or "bnb" in optim:
        # One byte a weight and state, with a float32 scale for each block of 256.
        scaled = (counts.lora + counts.full_head) * (1 + 4 / 256)
        return math.ceil(states * (scaled + 4 * counts.full_embeddings))
    return states * 4 * counts.trained


def disk_needs(
    counts: WeightCounts,
    *,
    optim: str,
    checkpoints: int,
    checkpoints_there: int = 0,
    best: int = 0,
    adapter: bool = True,
    merged: bool = True,
    prepared: bool = False,
    tokenizer_bytes: int = 0,
) -> Need:
    """Bytes that a stage writes.

    Args:
        counts: of its model.
        optim: the optimizer, in transformers' names.
        checkpoints: most checkpoints that are kept (`save_total_limit`); one more is there while it is written. 0:
            none.
        checkpoints_there: complete checkpoints that take their space already.
        best: copies of the trained weights that are kept beside the checkpoints (`policy_guards`), still to be made.
        adapter, merged, prepared: whether the adapter, the merged model and the prepared base are still to be made.
        tokenizer_bytes: of the tokenizer that each folder holds.
    """
    one = 4 * counts.saved + tokenizer_bytes  # float32, as trained
    model = 2 * counts.model + tokenizer_bytes
    more = max(1, checkpoints + 1 - checkpoints_there) if checkpoints and adapter else 0
    parts = {
        "prepared base": model if prepared else 0,
        f"{more} checkpoint{'s' if more != 1 else ''}": more * (one + optimizer_bytes(counts, optim)),
        "best adapters": best * 4 * counts.trained if checkpoints and adapter else 0,
        "adapter": one if adapter else 0,
        "merged model": model if merged else 0,
    }
    remedies = ["make room, or another --output_dir"]
    if checkpoints > 1:
        remedies.append(f"--save_total_limit 1 (now {checkpoints})")
    if more:
        remedies.append("--save_steps 0: no checkpoints, a killed run starts anew")
    remedies.append(f"a lower --lora_r (now {counts.rank})")
    return Need("writing", "disk", {name: size for name, size in parts.items() if size}, tuple(remedies))


def memory_needs(
    counts: WeightCounts,
    *,
    engine: str,
    dtype: str,
    load_in_4bit: bool,
    optim: str,
    training: bool = True,
    merging: bool = True,
    processes: int = 1,
) -> list[Need]:
    """Bytes of memory that training and merging need at least: weights and what belongs to them, no activations.

    Args:
        counts: of the model.
        engine, dtype, load_in_4bit: see `model_tools.Precision`.
        optim: the optimizer, in transformers' names.
        training, merging: which of them is still to be done.
        processes: that train together, each with a model of its own; the bytes are those of one.
    """
    width = 4 if dtype == "float32" else 2
    # NF4: half a byte, and for each block of 64 a one-byte scale, which itself has a float32 scale for 256 of them.
    linear = counts.linear * (0.5 + 1 / 64 + 4 / (64 * 256)) if load_in_4bit else counts.linear * width
    # peft keeps the original beside a matrix that is trained in full; Unsloth moves it out of the way.
    frozen = counts.embeddings - (counts.full_embeddings + counts.full_head if engine == "unsloth" else 0)
    needs = []
    if training:
        parts = {
            "frozen weights": math.ceil(linear + (frozen + counts.other) * width),
            "trained weights": 4 * counts.trained,
            "their gradients": 4 * counts.trained,
            "what processes exchange": 4 * counts.trained if processes > 1 else 0,  # a copy of the gradients
            # A paged optimizer's state may be in main memory.
            "optimizer": 0 if "paged" in optim else optimizer_bytes(counts, optim),
        }
        remedies = [] if load_in_4bit else ["--load_in_4bit true"]
        if "8bit" not in optim:
            remedies.append(f"--optim adamw_8bit (now {optim})")
        remedies.append(f"a lower --lora_r (now {counts.rank})")
        if counts.full_embeddings or counts.full_head:
            remedies.append("--target_modules without embed_tokens and lm_head")
        needs.append(Need("training", "memory", parts, tuple(remedies)))
    if merging:
        parts = {"weights in float32": 4 * counts.model, "adapter": 4 * counts.trained}
        needs.append(Need("merging", "memory", parts, ("end what else uses the memory", "another machine")))
    return needs


def read_free(folder: str | Path) -> Free:
    """What is free on the file system of a folder (which need not be there yet) and where a model would be loaded."""
    import torch

    place = _nearest_existing(Path(folder))
    disk = shutil.disk_usage(place).free
    if torch.cuda.is_available():
        return Free(disk, torch.cuda.mem_get_info()[0], str(place), "GPU memory")
    import psutil

    return Free(disk, psutil.virtual_memory().available, str(place), "main memory")


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def find_shortages(needs: Sequence[Need], free: Free) -> list[str]:
    """One line with figures for each need that what is free does not cover; empty if all is fine."""
    lines = []
    for need in needs:
        there = free.disk if need.kind == "disk" else free.memory
        if need.total <= there:
            continue
        what = f"of {free.memory_name}" if need.kind == "memory" else f"on the disk of {free.place}"
        parts = ", ".join(f"{name} {_in_units(size)}" for name, size in need.parts.items() if size)
        lines.append(
            f"{need.doing} needs at least {_in_units(need.total)} {what} ({parts}), {_in_units(there)} are free; what "
            f"helps, best first: {'; '.join(need.remedies)}"
        )
    return lines


def _in_units(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= 0.1 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"
