"""What several test files share: a generated dataset, a tiny base, and running a script as a user does."""

import contextlib
import gc
import importlib
import io
import signal
import sys
from pathlib import Path

import pytest
from script_processes import Script

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory):
    """A small generated dataset in the course's format."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    run("demo/make_dataset.py", "--out", folder, "--examples", 40, "--tasks_per_family", 1, "--max_side", 4)
    return folder


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory):
    """A tiny tied Llama with a tokenizer like Llama 3's."""
    folder = tmp_path_factory.mktemp("base") / "base"
    run("demo/make_base.py", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def taught_policy(tmp_path_factory):
    """Dataset and model of tiny_models.taught_policy, as flags; a training of 400 steps, which nothing changes."""
    import tiny_models

    dataset, model = tiny_models.taught_policy(tmp_path_factory.mktemp("policy"))
    return ("--dataset_dir", dataset, "--base_model", model)


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


def pytest_collection_finish():
    import hypothesis  # noqa: F401 - when imported it looks for what refers to other libraries' random numbers

    leave_out_libraries()


# The files that take longest, longest first: begun last, one of them would keep a single process busy at the end.
SLOW_FILES = (
    "test_stages",
    "test_distributed",
    "test_survival",
    "test_learn",
    "test_readme",
    "test_benchmark_scale",
    "test_folded_lora",
    "test_torture",
    "test_evaluate",
    "test_policy_guard",
    "test_pretraining",
    "test_reruns",
    "test_run_guards",
    "test_notebook",
    "test_policy_trainer",
    "test_bad_input",
    "test_scan",
    "test_report",
    "test_demo",
    "test_merge_tools",
    "test_inference_tools",
)


def pytest_collection_modifyitems(items):
    """Order the files; the tests of a file stay in theirs."""
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
