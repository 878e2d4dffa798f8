"""Troubles of the machine: full disks, too little memory, lost processes, NaN. Each becomes one message with advice."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arc.runs.needs import in_units, nearest_existing
from arc.runs.processes import fail


class NonFiniteError(ArithmeticError):
    """A loss or a weight is NaN or infinite: the training stops, and the last good checkpoint stays.

    Args:
        problem: what is not finite.
        step: the optimizer step after which it was seen.
    """

    def __init__(self, problem: str, step: int):
        super().__init__(f"{problem} after step {step}")
        self.step = step


OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Allocators of CUDA, cuBLAS and the CPU use different words and types. accelerate's should_reduce_batch_size knows
# neither cuBLAS's nor the driver's nor MemoryError, and takes an error of cuDNN for one of memory.
NO_MEMORY = re.compile(
    r"CUDA\b.{0,16}out of memory|CUBLAS_STATUS_ALLOC_FAILED|[Cc]an't allocate memory"  # of torch, the driver, Triton
    r"|Cannot allocate memory"
)
# How torch.save reports a write that failed: by the writer of the zip file, or by the C++ stream under it.
TORCH_WRITE = re.compile(r"PytorchStreamWriter failed|enforce fail at inline_container|basic_ios::clear|iostream error")
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers, written in Rust, end their messages
# A loader process has ended: the kernel killed it to free memory, or it got a signal that was sent to all.
WORKER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)", re.DOTALL)
# Another process of this run has ended: gloo and NCCL raise this in those that wait for it.
PEER_ENDED = re.compile(r"Connection (closed|reset) by peer|remote process exited or there was a network error")
# Names of functions that measure on held-out puzzles.
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

    Other errors pass through. If ARC_TRACEBACK is set in the environment, all errors do.

    Args:
        doing: what the block does, to be read after "while": "training", "merging".
        settings: names and values, for the advice; empty where no setting helps, as in a merge.
        folder: the folder that is written to; the message says how much its file system has free.
        checkpoint: returns the newest complete checkpoint, or None; called only after an error.
        artifacts: folders that may be finished by then; the message names those that exist.
        measuring: names of functions that measure on held-out puzzles. If memory runs out inside one of them, the
            advice is about their batch size.
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
    """Text that says which trouble of the machine an error is, and what to do; None for any other error.

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
    """Whether an error of any allocator says that memory ran out."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError is a RuntimeError; by its message it is known without importing torch.
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def _was_inside(error: BaseException, names: Sequence[str]) -> bool:
    """Whether a function of one of these names was running when the error was raised."""
    return any(frame.f_code.co_name in names for frame, _ in traceback.walk_tb(error.__traceback__))


def _disk_error_number(error: BaseException) -> int | None:
    """The errno of an error of writing; 0 if its number is not known; None for any other error."""
    if isinstance(error, OSError):
        return error.errno if error.errno in OUT_OF_SPACE | NOT_ALLOWED else None
    text = str(error)
    if match := OS_ERROR.search(text):
        return int(match[1]) if int(match[1]) in OUT_OF_SPACE | NOT_ALLOWED else None
    if isinstance(error, RuntimeError) and TORCH_WRITE.search(text):
        return next((number for number in OUT_OF_SPACE | NOT_ALLOWED if os.strerror(number) in text), 0)
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
        lower = next(divisor for divisor in range(size // 2, 0, -1) if size % divisor == 0)
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
    place = nearest_existing(folder)
    return (
        f"{text}\nThe file system of {place} has {in_units(shutil.disk_usage(place).free)} free: make room (or raise "
        "the quota or limit on file sizes), then run the same command again."
    )
