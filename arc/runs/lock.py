"""A lock, so that only one run at a time writes to an output folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

LOCK, LOCK_HOLDER = ".lock", ".lock.by"


class OutputLock:
    """Keeps a second run away from an output folder. The lock of a process that died is free.

    Args:
        folder: the output folder; created when the lock is taken.
        script: the script that takes the lock, for the message of a second run.
    """

    def __init__(self, folder: Path, script: str):
        self.folder, self.script = folder, script
        self._lock: Any = None

    def acquire(self) -> None:
        """Take the lock; does nothing if this run has it already.

        Raises:
            BlockingIOError: another process has it.
            OSError: the file system has no locks.
        """
        import filelock

        holder = "another run"
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Not in the lock's file: on a file system without locks, filelock writes its own record there.
        by = self.folder / LOCK_HOLDER
        lock = filelock.FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            with contextlib.suppress(OSError):
                holder = by.read_text(encoding="utf-8", errors="replace").strip()
            raise BlockingIOError(
                f"{self.folder} is in use by {holder}: wait for it to end, stop it, or use another --output_dir"
            ) from None
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be locked ({error.strerror or error}): use an --output_dir on a local disk"
            ) from None
        self._lock = lock
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        by.write_text(
            f"{self.script} (process {os.getpid()} on {socket.gethostname()}, since {now})\n", encoding="utf-8"
        )

    def release(self) -> None:
        """Give the lock back, if this run has it."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # the folder may be gone
                (self.folder / LOCK_HOLDER).unlink()
            self._lock.release(force=True)
            self._lock = None
