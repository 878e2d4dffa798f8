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
    "merging/test_merging",
    "runs/test_processes",
    "grpo/test_supervised_mix",
    "scripts/test_readme",
    "decoding/test_decoding",
    "benchmarks/test_torture",
    "models/test_folded_lora",
    "benchmarks/test_scale",
    "benchmarks/test_learn",
    "grpo/test_trainer",
    "grpo/test_guard",
    "runs/test_checkpoints",
    "generation/test_pretraining",
    "scripts/test_reruns",
    "scripts/test_survival",
    "generation/test_programs",
    "evaluation/test_evaluate",
    "generation/test_families",
    "generation/test_make_base",
    "training/test_batch_planning",
    "puzzles/test_dataset",
    "grpo/test_scan",
)


# Files whose tests train models or start scripts, which `make check` leaves out. Other files mark single tests.
TRAINING_FOLDERS = {"scripts", "benchmarks"}
TRAINING_FILES = {
    "decoding/test_decoding",
    "evaluation/test_evaluate",
    "generation/test_families",
    "generation/test_make_base",
    "generation/test_make_dataset",
    "generation/test_pretraining",
    "grpo/test_guard",
    "grpo/test_scan",
    "grpo/test_supervised_mix",
    "grpo/test_trainer",
    "merging/test_merging",
    "models/test_folded_lora",
    "runs/test_checkpoints",
    "runs/test_processes",
    "training/test_batch_planning",
    "training/test_extra_data",
    "training/test_muon",
}


def pytest_collection_modifyitems(items):
    """Mark the tests that train, and order the files; the tests of a file stay in theirs."""
    for item in items:
        if item.path.parent.name in TRAINING_FOLDERS or f"{item.path.parent.name}/{item.path.stem}" in TRAINING_FILES:
            item.add_marker("training")
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(f"{item.path.parent.name}/{item.path.stem}", len(order)))
