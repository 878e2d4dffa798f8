"""Runs that survive: signals, checkpoints that are whole, losses that are no numbers, full disks, pickles."""

import json
import re
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from arc.runs.checkpoints import complete_checkpoints, mark_complete
from tests.helpers import call, run
from tests.script_processes import Script
from tests.scripts.test_stages import SFT, artifact

QUICK = (*SFT, "--eval_steps", 0, "--logging_steps", 1, "--lr_scheduler_type", "constant_with_warmup")


def wait_for_step(work, step, process):
    """Wait until a step is logged."""
    for _ in range(6000):
        lines = (work / "metrics.jsonl").read_text().splitlines() if (work / "metrics.jsonl").exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        assert process.poll() is None, process.printed()
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo_base, demo_dataset):
    """The adapter's weights after 40 steps in one go, and the flags."""
    output = tmp_path_factory.mktemp("whole")
    flags = (*QUICK, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--max_steps", 40, "--save_steps", 0)
    code, printed = call("base_finetune", *flags, "--output_dir", output)
    assert code == 0, printed
    return load_file(artifact(output, "Base-lora") / "adapter_model.safetensors"), flags[:-2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_first_and_the_same_command_continues(tmp_path, uninterrupted, number):
    whole, flags = uninterrupted
    process = Script("base_finetune.py", *flags, "--output_dir", tmp_path)
    wait_for_step(artifact(tmp_path, "Base-checkpoints"), 3, process)
    process.send_signal(number)
    code, printed = process.wait(120), process.printed()
    assert code == 128 + number, printed
    stopped = re.search(rf"{number.name}: stopped; the same command continues from (\S+checkpoint-\d+)", printed)
    assert stopped, printed
    assert not artifact(tmp_path, "Base-lora").exists()
    code, printed = call("base_finetune", *flags, "--output_dir", tmp_path)
    assert code == 0 and f"continuing from {stopped[1]}" in printed, printed
    again = load_file(artifact(tmp_path, "Base-lora") / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_saving_by_the_clock_changes_nothing(tmp_path, uninterrupted, monkeypatch):
    whole, flags = uninterrupted
    monkeypatch.setattr("arc.training.run.SAVE_SECONDS", 0.2)
    code, printed = call("base_finetune", *flags, "--output_dir", tmp_path)
    assert code == 0, printed
    again = load_file(artifact(tmp_path, "Base-lora") / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    kept = complete_checkpoints(artifact(tmp_path, "Base-checkpoints"))
    assert [p.name for p in kept][0] == "checkpoint-40" and len(kept) == 2  # --save_total_limit
    # From the one before the last on, which the clock chose: the same again.
    for path in (artifact(tmp_path, "Base-lora"), artifact(tmp_path, "Base-merged"), kept[0]):
        shutil.rmtree(path)
    code, printed = call("base_finetune", *flags, "--output_dir", tmp_path)
    assert code == 0 and f"continuing from {kept[1]}" in printed, printed
    again = load_file(artifact(tmp_path, "Base-lora") / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(tmp_path, capfd, demo_base, demo_dataset):
    flags = (*QUICK, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", tmp_path)
    flags = (*flags, "--max_steps", 30, "--save_steps", 2, "--optim", "adamw_torch")
    code, printed = call("base_finetune", *flags, "--learning_rate", 1e30)
    assert code == 1 and re.search(
        r"error: (the loss is \w+|weights are not finite \(.*\)) after step \d+, while training", printed
    )
    assert "Lower --learning_rate (now 1e+30)" in printed and "Traceback" not in printed
    assert not artifact(tmp_path, "Base-lora").exists()
    for checkpoint in artifact(tmp_path, "Base-checkpoints").glob("checkpoint-*"):
        state = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, demo_base, demo_dataset):
    flags = (*QUICK, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", tmp_path)
    flags = (*flags, "--max_steps", 400, "--save_steps", 5)
    process = Script("base_finetune.py", *flags)
    work = artifact(tmp_path, "Base-checkpoints")
    wait_for_step(work, 6, process)
    # No file may grow beyond this any more: as for a full disk, a write fails.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    code, printed = process.wait(120), process.printed()
    assert code == 1, printed
    message = printed[printed.index("error: ") :]
    assert re.match(r"error: cannot write \S+ while training \(", message) and " free: make room" in message, message
    assert "Traceback" not in printed
    last = complete_checkpoints(work)[0]
    assert f"The last good checkpoint is {last}" in message
    assert not list(tmp_path.glob("*.incomplete"))
    code, printed = call("base_finetune", *flags[:-3], 12, "--save_steps", 5)
    assert code == 2 and "max_steps" in printed  # another course
    assert load_file(last / "adapter_model.safetensors")


class Planted:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, uninterrupted):
    """The output folder of a run of eight steps that has come to the checkpoint of the fourth, and its flags."""
    output, flags = tmp_path_factory.mktemp("stopped"), (*uninterrupted[1], "--save_steps", 4, "--max_steps", 8)
    code, printed = call("base_finetune", *flags, "--output_dir", output)
    assert code == 0, printed
    for name in ("Base-lora", "Base-merged", "Base-checkpoints/checkpoint-8"):
        shutil.rmtree(artifact(output, name))
    return output, flags


@pytest.fixture
def stopped(tmp_path, stopped_run):
    """The flags of a copy of it, and its checkpoint."""
    output = shutil.copytree(stopped_run[0], tmp_path / "output")
    [checkpoint] = complete_checkpoints(artifact(output, "Base-checkpoints"))
    return (*stopped_run[1], "--output_dir", output), checkpoint


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_in_a_checkpoint_does_not_run(tmp_path, stopped, name):
    flags, checkpoint = stopped
    torch.save(Planted(tmp_path / "ran"), checkpoint / name)
    torch.save(Planted(tmp_path / "ran"), checkpoint / "training_args.bin")
    mark_complete(checkpoint)
    code, printed = call("base_finetune", *flags)
    assert code == 2 and f"{name} holds more than tensors" in printed, printed
    assert not (tmp_path / "ran").exists()


def test_a_planted_training_args_is_never_loaded(tmp_path, stopped):
    flags, checkpoint = stopped
    torch.save(Planted(tmp_path / "ran"), checkpoint / "training_args.bin")
    mark_complete(checkpoint)
    code, printed = call("base_finetune", *flags)
    assert code == 0 and f"continuing from {checkpoint}" in printed, printed
    assert not (tmp_path / "ran").exists()


def test_final_folders_hold_no_pickles_and_checkpoints_are_marked(tmp_path, uninterrupted):
    _, flags = uninterrupted
    assert call("base_finetune", *flags, "--output_dir", tmp_path, "--max_steps", 2, "--save_steps", 2)[0] == 0
    for name in ("prepared", "Base-lora", "Base-merged"):
        suffixes = {path.suffix for path in artifact(tmp_path, name).rglob("*") if path.is_file()}
        assert suffixes <= {".json", ".jsonl", ".safetensors", ".png", ".md"}, name
    marker = artifact(tmp_path, "Base-checkpoints") / "checkpoint-2" / "complete.json"
    sizes = json.loads(marker.read_text())
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(sizes)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, uninterrupted):
    """The output folder of a run of three steps that nothing stopped, and the flags."""
    output, flags = tmp_path_factory.mktemp("three"), (*uninterrupted[1], "--max_steps", 3)
    code, printed = call("base_finetune", *flags, "--output_dir", output)
    assert code == 0, printed
    return output, flags


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 6])
def test_killed_just_before_or_after_a_folder_gets_its_name(tmp_path, three_steps, moment):
    # The three renames of stage 1: -prepared, -lora, -merged. Dying right there leaves no time to tidy up.
    whole, flags = three_steps
    output, script = tmp_path / "output", tmp_path / "dies.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nimport base_finetune\n"
        "real, seen = Path.rename, []\n"
        "def rename(self, target):\n"
        "    if self.name.endswith('.incomplete'):\n"
        "        seen.append(1)\n"
        f"        if len(seen) == {(moment + 1) // 2}:\n"
        f"            {'pass' if moment % 2 else 'real(self, target)'}\n"
        "            os._exit(137)\n"
        "    return real(self, target)\n"
        "Path.rename = rename\nbase_finetune.main()\n"
    )
    run(script, *flags, "--output_dir", output, expect=137)
    exit_code, printed = call("base_finetune", *flags, "--output_dir", output)
    assert exit_code == 0, printed
    assert ("training skipped" in printed) == (moment >= 4), printed
    assert ("merge skipped" in printed) == (moment == 6), printed
    assert not list(output.glob("*.incomplete"))
    for name, file in (("Base-lora", "adapter_model.safetensors"), ("Base-merged", "model.safetensors")):
        assert artifact(whole, name).joinpath(file).read_bytes() == artifact(output, name).joinpath(file).read_bytes()
