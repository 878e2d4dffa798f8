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
