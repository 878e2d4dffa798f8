"""Loader processes: how they begin and end with the training."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from typing import Any


def spare_workers(trainer: Any) -> None:
    # Processes that make batches: a signal to the whole group is for the one that trains, which ends them in order.
    make = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = make()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wraps PyTorch's
        if inner.num_workers:
            inner.worker_init_fn = leaving_signals(inner.worker_init_fn)
        return loader

    trainer.get_train_dataloader = get_train_dataloader


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
