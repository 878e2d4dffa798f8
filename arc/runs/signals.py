"""Stop signals: a checkpoint first, then the end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from arc.runs.checkpoints import complete_checkpoints
from arc.runs.processes import agree, fail, is_main

SAME_SIGNAL = 1.0  # seconds in which a second signal is the first one's copy: `timeout` and wrappers send it twice


class StopSignals:
    """Context manager: records SIGTERM and SIGINT, so that the training stops after a step. A second one acts at once.

    For the training only, because only `guard` looks at the record. Does nothing outside the main thread. A signal that
    this process ignores stays ignored.

    Attributes:
        received: the first signal, or None.
        saves: whether a checkpoint is saved before the stop; for the printed line. `guard` sets it.
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
        """Whether any process of this run has received a signal; then all processes record it."""
        [number] = agree(int(self.received or 0))
        if number and self.received is None:
            self.received = signal.Signals(number)
        return self.received is not None

    def end_if_received(self, folder: str | Path) -> None:
        """End the program after the training if a signal has stopped it.

        Args:
            folder: of the checkpoints; the message names the newest.

        Raises:
            SystemExit: with 128 + the signal's number (143 for SIGTERM, 130 for SIGINT).
        """
        if self.received is None:
            return
        kept = complete_checkpoints(folder, quiet=True)
        advice = f"the same command continues from {kept[0]}" if kept else "no checkpoint was written"
        fail(f"{self.received.name}: stopped; {advice}", 128 + self.received)
