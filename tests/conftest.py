"""What several test files share: a generated dataset, a tiny base, and running a script as a user does."""

import contextlib
import signal

import pytest

from tests.helpers import leave_out_libraries, run

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    from tests import tiny_models

    dataset, model = tiny_models.taught_policy(tmp_path_factory.mktemp("policy"))
    return ("--dataset_dir", dataset, "--base_model", model)


def pytest_collection_finish():
    with contextlib.suppress(ImportError):  # a CUDA box, whose tests do without it
        import hypothesis  # noqa: F401 - when imported it looks for what refers to other libraries' random numbers

    leave_out_libraries()


# The files that take longest, longest first: begun last, one of them would keep a single process busy at the end.
SLOW_FILES = (
    "scripts/test_stages",
    "runs/test_processes",
    "scripts/test_survival",
    "benchmarks/test_learn",
    "scripts/test_readme",
    "benchmarks/test_scale",
    "models/test_folded_lora",
    "benchmarks/test_torture",
    "evaluation/test_evaluate",
    "grpo/test_guard",
    "generation/test_pretraining",
    "scripts/test_reruns",
    "runs/test_checkpoints",
    "scripts/test_notebook",
    "grpo/test_trainer",
    "scripts/test_bad_input",
    "grpo/test_scan",
    "evaluation/test_report",
    "generation/test_make_dataset",
    "merging/test_merging",
    "decoding/test_decoding",
)


# Files whose tests train models or start scripts: `make check` does without them.
TRAINING_FILES = {
    *SLOW_FILES,
    "evaluation/test_evaluate",
    "generation/test_demo",
    "training/test_muon",
    "training/test_batch_planning",
} - {"evaluation/test_report", "runs/test_checkpoints"}


def pytest_collection_modifyitems(items):
    """Mark the tests that train, and order the files; the tests of a file stay in theirs."""
    for item in items:
        if f"{item.path.parent.name}/{item.path.stem}" in TRAINING_FILES:
            item.add_marker("training")
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(f"{item.path.parent.name}/{item.path.stem}", len(order)))
