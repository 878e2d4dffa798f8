"""Stop signals: the training saves a checkpoint, then it ends."""

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

SAME_SIGNAL = 1.0  # seconds; a second signal within them is a copy: `timeout` and wrappers send each twice


class StopSignals:
    """Context manager that records SIGTERM and SIGINT, so that a training can stop after a step.

    A second signal ends the program at once. Use it around the training only: nothing else looks at the record. It does
    nothing outside the main thread, and does not handle signals that this process ignores.

    Attributes:
        received: the first signal, or None.
        saves: whether a checkpoint will be saved before the end, for the printed line. `guard` sets it.
    """

    def __init__(self) -> None:
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
            return  # in a loader process, which Ctrl-C reaches too: the training process decides
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if not is_main():  # a launcher sends the signal to all processes; one of them prints
                return
            how = "with a checkpoint" if self.saves else "without a checkpoint (they are off)"
            # Not print: the signal may have interrupted one, and streams cannot be entered twice.
            with contextlib.suppress(OSError):
                name = self.received.name
                os.write(2, f"{name}: stopping after this step, {how}; once more: at once\n".encode())
        elif now - self._received_at > SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(number)

    def agree(self) -> bool:
        """Whether any process of this run has received a signal; all of them record it then."""
        [number] = agree(int(self.received or 0))
        if number and self.received is None:
            self.received = signal.Signals(number)
        return self.received is not None

    def end_if_received(self, folder: str | Path) -> None:
        """End the program if a signal stopped the training, with the exit code of that signal.

        Args:
            folder: of the checkpoints; the message names the newest.

        Raises:
            SystemExit: with 128 + the signal's number (143 for SIGTERM, 130 for SIGINT).
        """
        if self.received is None:
            return
        checkpoints = complete_checkpoints(folder, quiet=True)
        advice = f"the same command continues from {checkpoints[0]}" if checkpoints else "no checkpoint was written"
        fail(f"{self.received.name}: stopped; {advice}", 128 + self.received)
