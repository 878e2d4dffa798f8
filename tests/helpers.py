"""What several test files share: running a script as a user does, and calling a stage in this process."""

import contextlib
import gc
import importlib
import io
import sys
from pathlib import Path

from tests.script_processes import Script

ROOT = Path(__file__).resolve().parents[1]
SHARED = (
    ROOT.parent / "shared"
)  # larger inputs that a checkout may have beside it; tests that need them say so when it has not


def run(script, *flags, expect=0, **how):
    """Run a script of the project; returns what it printed (both streams), after checking its exit code."""
    process = Script(script, *flags, **how)
    code, printed = process.wait(), process.printed()
    assert code == expect, f"{script} ended with {code}:\n{printed[-5000:]}"
    return printed


def call(script, *flags):
    """Run a stage's main in this process; returns its exit code and what it printed (both streams).

    Quicker than `run`, for the many cases in which nothing depends on a process of its own.
    """
    module = importlib.import_module(script)
    printed = io.StringIO()
    imported = len(sys.modules)
    arguments, sys.argv = sys.argv, [f"{script}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                module.main()
            except SystemExit as stop:
                return stop.code or 0, printed.getvalue()
    finally:
        sys.argv = arguments
        if len(sys.modules) > imported + 50:
            leave_out_libraries()
    return 0, printed.getvalue()


def leave_out_libraries():
    """Have searches for garbage, of which each stage starts several, leave out what is imported: 0.4 s each."""
    gc.collect()
    gc.freeze()
