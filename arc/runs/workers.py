"""Loader processes: how they begin and end with the training."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from arc.models.library_patches import change_train_loader


def spare_workers(trainer: Any) -> None:
    """Make a trainer's loader processes ignore stop signals, which a terminal or launcher sends to the whole group.

    The process that trains handles the signal and ends them in order.
    """

    def leave_signals(loader: Any) -> None:
        if loader.num_workers:
            loader.worker_init_fn = leaving_signals(loader.worker_init_fn)

    change_train_loader(trainer, leave_signals)


@functools.cache
def end_workers_at_exit() -> None:
    """Kill loader processes that are left when this process exits.

    At exit multiprocessing sends SIGTERM to its daemons, such as loader processes, and waits for them without a limit.
    Those ignore SIGTERM, see `leaving_signals`. An error that nothing catches keeps their loader until then.
    """

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


def leaving_signals(begin: Callable[[int], Any] | None = None) -> Callable[[int], None]:
    """The worker_init_fn of a loader whose processes leave signals to this one, and end with it.

    Args:
        begin: what each does then, if anything.
    """
    end_workers_at_exit()
    return partial(begin_worker, begin)
