"""A merge in a fresh process: the side that starts it, and how results and errors come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arc.models.loading import Precision
from arc.models.weights import MergeError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "arc.merging")
# An error comes back as the first of these kinds that it is one of; as a RuntimeError if it is of none.
ERRORS = {
    kind.__name__: kind for kind in (MergeError, FileNotFoundError, ValueError, OSError, MemoryError, RuntimeError)
}


def merge_in_own_process(
    adapter: str | Path, out: str | Path, *, base: str | Path | None, merge_base: str, precision: Precision | None
) -> dict[str, Any]:
    """`merge.merge_and_check` in a fresh process, whose output is printed here.

    Raises:
        MergeError, ValueError, OSError, MemoryError: as that process raised it.
        RuntimeError: another error, or the process ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*COMMAND, str(adapter), str(out), "--merge_base", merge_base, "--merge", str(result)]
        command += ["--base", str(base)] if base else []
        command += ["--precision", json.dumps(asdict(precision))] if precision else []
        # The scripts are run from any folder: the process finds the package where this one did.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        # Line by line through this process, so that the output goes wherever this process's goes.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
        if not result.is_file():
            raise RuntimeError(f"the process that merges {adapter} ended with {process.returncode} and no result")
        done = json.loads(result.read_text(encoding="utf-8"))
    if "error" in done:
        error = ERRORS[done["error"]](done["message"])
        if isinstance(error, OSError):
            error.errno = done.get("errno")
        raise error
    return done


def write_error(error: Exception, path: Path) -> None:
    """Write an error into the result's file, for the process that waits for it."""
    kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), "RuntimeError")
    passed = {"error": kind, "message": str(error), "errno": getattr(error, "errno", None)}
    path.write_text(json.dumps(passed), encoding="utf-8")


def end_with_parent() -> None:
    """End this process when the one that started it has ended: that one holds the other end of standard input."""

    def wait() -> None:
        # Not sys.stdin: its lock, held here, would keep the interpreter from ending in order.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
