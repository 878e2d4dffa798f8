"""Work on many items in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

CHUNK = 50  # items that a process takes at a time


def map_in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int | None) -> list[Any]:
    """The results of `function` for all items, in their order.

    Args:
        function: of a module, so that another process can import it.
        items: its arguments.
        workers: processes; None: one a core. Up to CHUNK items are worked on in this process alone.
    """
    workers = min(workers or os.cpu_count() or 1, -(-len(items) // CHUNK))
    if workers <= 1:
        return list(map(function, items))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, items, chunksize=CHUNK)
