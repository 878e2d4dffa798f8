"""Scripts in processes of their own, most of them without importing the libraries anew.

To import torch, transformers, peft and trl takes a script longer than all that it does in a test. So one process
imports them once and waits; each script runs in a fork of it, with arguments, environment, folder, output, signals and
exit code of its own. `fresh=True` starts a new interpreter instead, as a user does. Forks share what an interpreter
draws when it starts: hashes of strings, and numpy's global generator. An exception that nothing catches is exit code 1.
"""

import atexit
import contextlib
import gc
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("trl.trainer.grpo_trainer", "transformers.hf_argparser", "diskcache", "matplotlib.backends.backend_agg")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # read when the libraries are imported

_forks = None
_starting = threading.Lock()


def forks():
    """The waiting process, begun at the first call; None where fork cannot be relied on: CUDA does not survive it."""
    global _forks
    if _forks is None and sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        _forks = multiprocessing.get_context("forkserver")
        _forks.set_forkserver_preload(list(LIBRARIES))
        with mock.patch.dict(os.environ, OFFLINE):
            forkserver.ensure_running()
    return _forks


def run_here(script, flags, folder, environment, outputs, own_session):
    """Be `python script flags` in this process, which was forked for it."""
    if own_session:
        os.setsid()
    gc.freeze()  # else each search for garbage would look through the libraries again: 0.4 s
    resource_tracker._resource_tracker._fd = None  # one of its own looks after its semaphores, as of any program
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(output.fileno(), number)
    for output in set(outputs):
        output.close()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in environment)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found out anew, from the environment
    if threads := environment.get("OMP_NUM_THREADS"):  # read when torch was imported
        import torch

        torch.set_num_threads(int(threads))
    os.chdir(folder)
    sys.argv = [script, *flags]
    sys.path[:0] = [str(Path(script).parent), str(ROOT)]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Output(threading.Thread):
    """Takes what is written to `end`, a pipe, until all writers have closed it."""

    def __init__(self):
        """See the class."""
        super().__init__(daemon=True)
        self.reader, self.end = multiprocessing.Pipe(duplex=False)
        self.content = b""

    def run(self):
        """Read."""
        with self.reader:
            while more := os.read(self.reader.fileno(), 65536):
                self.content += more


class Script:
    """A script that was started.

    Args:
        script: below the project's root, or anywhere.
        flags: of its command line.
        cwd: folder to start it in.
        fresh: start a new interpreter.
        own_session: start it in a session of its own, so that its group can be killed.
        log: a binary file that takes what it prints, instead of `printed`.
        environment: variables that are added to this process's.
    """

    def __init__(self, script, *flags, cwd=ROOT, fresh=False, own_session=False, log=None, **environment):
        """See the class."""
        self.script = script = str(ROOT / script)
        flags = [str(flag) for flag in flags]
        environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
        self._asking = threading.Lock()
        self._outputs = [] if log else [Output(), Output()]
        ends = [output.end for output in self._outputs]
        if log:
            ends = [Connection(os.dup(log.fileno()), readable=False)] * 2
        context = None if fresh else forks()
        if context is None:
            self._process = subprocess.Popen(
                [sys.executable, script, *flags], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=ends[0],
                stderr=ends[1], start_new_session=own_session,
            )  # fmt: skip
        else:
            arguments = (script, flags, str(cwd), environment, ends, own_session)
            self._process = context.Process(target=run_here, args=arguments)
            with _starting:
                self._process.start()
                process._children.discard(self._process)  # else the start of another one asks how this one ended
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the waiting process knows before this one
            while own_session and self.poll() is None and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)
        atexit.register(self.kill)  # a test that fails may leave it running
        for end in set(ends):
            end.close()
        for output in self._outputs:
            output.start()

    def poll(self):
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        with self._asking:  # it comes through a pipe, once
            return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """End it."""
        self.send_signal(signal.SIGKILL)

    def printed(self):
        """What it has printed so far: stdout, then stderr."""
        return "".join(output.content.decode("utf-8", "replace") for output in self._outputs)

    def wait(self, timeout=None):
        """Wait for its end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running after so many seconds.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.script, timeout, self.printed()[-5000:])
            time.sleep(0.01)
        for output in self._outputs:
            output.join(timeout)
        atexit.unregister(self.kill)
        return self.poll()
