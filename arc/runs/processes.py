"""Several processes of one host that do one run: which one writes, how they wait for each other, how they end.

A launcher (torchrun, accelerate launch) starts a script once for each GPU. `start` joins these processes. From then on
only the main one prints and writes. Without a launcher, the functions here have nothing to do.

accelerate's PartialState joins the processes. Its waits and gathers are not used: they go through the group that
training uses, and the wait until a base is prepared may be longer than NCCL's time-out. So there is a second group,
over gloo, and it works on objects and on the CPU. A process that fails writes that into the launcher's store, which a
thread of each other process watches. So no process waits for one that has ended, and only one message is printed.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

POLL_SECONDS = 0.1  # between two looks whether another process has failed
REPORT_SECONDS = 10.0  # a second process that fails waits so long for the first one's message
LONG = datetime.timedelta(days=7)  # time-out of the second group: the watcher ends a wait in vain
TRAINING_TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange of gradients, as in transformers
# Set by launchers; deleted when a process goes on alone, so that no library joins a group again.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
                    "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


@dataclass
class _Together:
    """The processes that were joined.

    Args:
        index, count: of this process, and how many there are.
        group: of torch.distributed, over gloo.
        store: the launcher's, for failures.
        ending: set when this process is about to end, so that its watcher does not end it.
        code: its exit code after a failure.
    """

    index: int
    count: int
    group: Any
    store: Any
    ending: threading.Event = field(default_factory=threading.Event)
    code: int = 0


_together: _Together | None = None


def process_count() -> int:
    """The number of processes of this run."""
    return 1 if _together is None else _together.count


def process_index() -> int:
    """The index of this process; the main one has 0."""
    return 0 if _together is None else _together.index


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def start() -> None:
    """Join the processes that a launcher started. Does nothing a second time, without a launcher, or for one process.

    From then on only the main process prints, and each process computes on the GPU of its index.

    Raises:
        ValueError: more processes than GPUs, processes on several hosts, or a launcher that divides the model.
    """
    global _together
    count = int(os.environ.get("WORLD_SIZE", "1"))
    launched = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if _together is not None or count <= 1 or not launched:
        return
    index = int(os.environ["RANK"])
    if index:
        # Until the end, also for what libraries print; `fail` uses the real stream.
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if int(os.environ.get("LOCAL_WORLD_SIZE", count)) != count:
        raise ValueError(f"{count} processes on several hosts: start all on one (--nnodes 1, --num_machines 1)")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"accelerate is configured for {name}, which divides the model; here each process has a whole one: "
                "start with torchrun, or another configuration of accelerate"
            )
    import torch
    from accelerate import PartialState

    device = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda and count > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"{count} processes for {gpus} GPUs: start one for each (--nproc_per_node {gpus})")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Otherwise accelerate calls it cpu:0, cpu:1, ..., and transformers cannot load a checkpoint onto that.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host; its name need not be known to any server
    PartialState(cpu=not cuda, timeout=TRAINING_TIMEOUT)
    distributed = torch.distributed
    group = distributed.new_group(backend="gloo", timeout=LONG)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _together = _Together(index, count, group, distributed.PrefixStore(f"run {attempt}", store))
    sys.excepthook = _report_uncaught
    atexit.register(_end_quietly)
    # A second connection: a store answers one request at a time.
    watched = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
    watched = distributed.PrefixStore(f"run {attempt}", watched)
    threading.Thread(target=_watch, args=(watched, _together.ending), daemon=True, name="failures").start()


def wait_for_everyone() -> None:
    """Return when all processes have called this."""
    if _together is not None:
        import torch

        torch.distributed.barrier(group=_together.group)


def agree(*numbers: int) -> tuple[int, ...]:
    """For each number the largest that any process gives; all processes get the same."""
    if _together is None:
        return numbers
    import torch

    values = torch.tensor(numbers, dtype=torch.int64)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=_together.group)
    return tuple(values.tolist())


def gather(value: Any) -> list[Any]:
    """The values that the processes give, in the order of their indices; all processes get all of them.

    Args:
        value: anything that can be pickled; only processes of this program send any.
    """
    if _together is None:
        return [value]
    import torch

    values: list[Any] = [None] * _together.count
    torch.distributed.all_gather_object(values, value, group=_together.group)
    return values


def share(items: Sequence[Any]) -> list[Any]:
    """The items that this process works on: each item goes to one process; their counts differ by at most one."""
    return list(items[process_index() :: process_count()])


def leave() -> None:
    """End the work together: when all processes have called this, the main one goes on alone and the others end.

    Raises:
        SystemExit: with 0, in all processes but the main one.
    """
    global _together
    if _together is None:
        return
    import torch
    from accelerate.state import AcceleratorState

    wait_for_everyone()
    main = is_main()
    _together.ending.set()
    _together = None
    torch.distributed.destroy_process_group()
    if not main:
        sys.exit(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in list(os.environ):
        if name in LAUNCH_VARIABLES or name.startswith("ACCELERATE_"):
            del os.environ[name]
    sys.excepthook = sys.__excepthook__


def fail(message: str, code: int) -> NoReturn:
    """Print a message and end the program. If several processes fail, all use the first one's message and code.

    Args:
        message: for stderr.
        code: the exit code.

    Raises:
        SystemExit: with the code.
    """
    code = _report(lambda: print(message, file=sys.stderr, flush=True), code)
    if _together is not None:
        _together.code = code
    sys.exit(code)


def _report(show: Callable[[], None], code: int) -> int:
    # Prints the message unless another process has; returns the exit code.
    if _together is None:
        show()
        return code
    _together.ending.set()
    store = _together.store
    try:
        first = store.add("failures", 1) == 1
    except RuntimeError:  # the launcher is gone, and its store
        first = True
    if first:
        if threading.current_thread() is threading.main_thread():
            # The launcher ends all processes when one has ended; this one has to clean up first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not is_main():
            sys.stderr = sys.__stderr__
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        show()
        with contextlib.suppress(RuntimeError):
            store.set("code", str(code))
        return code
    # The launcher ends all processes when one has ended: so wait until the message is printed.
    end = time.monotonic() + REPORT_SECONDS
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end:
            if store.check(["code"]):
                return int(store.get("code"))
            time.sleep(POLL_SECONDS)
    return code


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    code = 130 if issubclass(kind, KeyboardInterrupt) else 1
    code = _report(lambda: sys.__excepthook__(kind, error, trace), code)
    _exit_now(code)


def _watch(store: Any, ending: threading.Event) -> None:
    # Ends this process when another one has failed, even if it waits for that one inside a library.
    while not ending.wait(POLL_SECONDS):
        try:
            if not store.check(["code"]):
                continue
            code = int(store.get("code"))
        except RuntimeError:
            code = 1  # the launcher is gone
        if not ending.is_set():
            _exit_now(code)


def _exit_now(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _end_quietly() -> None:
    # The program ends without `leave`: in a dry run, or after a failure. No library may wait for the others then.
    if _together is None:
        return
    if _together.ending.is_set():
        _exit_now(_together.code)
    import torch

    _together.ending.set()
    torch.distributed.destroy_process_group()


def divide_batch(size: int, accumulation: int, processes: int | None = None) -> tuple[int, int]:
    """Divide a step among processes, so that all together compute as many samples as one process would.

    Each process gets an equal number of the step's forward passes. If they do not divide evenly, passes get smaller.

    Args:
        size: samples of a forward pass, as set; the result is never larger.
        accumulation: forward passes of a step, as set.
        processes: their number; default: that of this run.

    Returns:
        Samples of a forward pass, and forward passes of a step, for each process.

    Raises:
        ValueError: the samples of a step cannot be divided evenly.
    """
    processes = process_count() if processes is None else processes
    if accumulation % processes == 0:
        return size, accumulation // processes
    each, rest = divmod(size * accumulation, processes)
    if rest:
        raise ValueError(
            f"the {size * accumulation} samples of a step (--per_device_train_batch_size {size} x "
            f"--gradient_accumulation_steps {accumulation}) cannot be divided among {processes} processes: start a "
            "number of processes that divides them, or change one of the two"
        )
    size = max(divisor for divisor in range(1, size + 1) if each % divisor == 0)
    return size, each // size
