"""Several processes that do one run together, started by torchrun on the CPU (gloo): the same result as of one.

The launcher is what some tests are about; the others start the processes themselves, as it does.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arc.models.collator import InputMaskingDataCollator
from arc.models.vocabulary import cut_tokenizer, load_tokenizer
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.text import format_options
from arc.runs.checkpoints import complete_checkpoints
from arc.runs.processes import agree, divide_batch, gather, is_main, process_count, share, wait_for_everyone
from arc.training.rows import EpochSampler, FilledSamples
from demo import make_dataset
from tests.helpers import ROOT, call
from tests.script_processes import Script
from tests.scripts.test_stages import SMALL, artifact

TRAIN = (*SMALL, "--gradient_accumulation_steps", 2, "--logging_steps", 1, "--eval_steps", 0, "--dtype", "float32")
GRPO = (*SMALL, "--max_steps", 2, "--eval_steps", 2, "--num_generations", 4, "--logging_steps", 1)
GRPO += ("--fast_rollouts", True)


def command(script, *flags):
    """Two processes of a script; `--` keeps torchrun from reading flags that are the script's."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def alone(script, *flags):
    """What one process of a script prints, this one."""
    code, printed = call(script.removesuffix(".py"), *flags)
    assert code == 0, printed
    return printed


def start(script, *flags):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


def launch(script, *flags, expect=0):
    """What two processes of a script print, after checking the launcher's exit code (1 for any failure)."""
    process = start(script, *flags)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == expect, printed[-6000:]
    return printed


def launch_quickly(script, *flags):
    """What two processes of a script print, started as torchrun starts them: with a store and these variables."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    together |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    processes = [Script(script, *flags, RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]
    end = time.monotonic() + 120
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
        if any(codes):  # the other would wait for it
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait(10)
    printed = "".join(process.printed() for process in processes)
    assert codes == [0, 0], printed[-6000:]
    return printed


def exit_codes(printed):
    """Exit codes of the processes that failed by themselves, from the launcher's report."""
    return [int(code) for code in re.findall(r"exitcode  : (-?\d+)", printed)]


def weights(output, name="Base-lora"):
    return load_file(artifact(output, name) / "adapter_model.safetensors")


def records(output, name="Base-lora"):
    return [json.loads(line) for line in (artifact(output, name) / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one, two, name="Base-lora"):
    """Losses, gradients and adapters that differ by no more than rounding."""
    for wanted in ("loss", "grad_norm", "eval_loss", "eval_exact_match", "eval_decodable"):
        a, b = ([r[wanted] for r in records(part, name) if wanted in r] for part in (one, two))
        assert a == pytest.approx(b, rel=1e-5), wanted
    a, b = weights(one, name), weights(two, name)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


def processes_of(launcher):
    """Ids of the processes that a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(number) for number in children.split()]


def wait_for_step(output, step, process):
    path = artifact(output, "Base-checkpoints") / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


# --- what needs no launcher


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "divided"),
    [(4, 2, 1, (4, 2)), (4, 2, 2, (4, 1)), (4, 2, 4, (2, 1)), (4, 2, 8, (1, 1)), (6, 3, 2, (3, 3)), (5, 2, 2, (5, 1)),
     (4, 3, 6, (2, 1)), (16, 2, 4, (8, 1)), (8, 1, 2, (4, 1)), (9, 2, 6, (3, 1))],
)  # fmt: skip
def test_a_step_has_as_many_samples_on_any_number_of_processes(size, accumulation, processes, divided):
    assert divide_batch(size, accumulation, processes) == divided
    assert divided[0] * divided[1] * processes == size * accumulation and divided[0] <= size


def test_a_step_that_cannot_be_divided_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"the 8 samples of a step .*batch_size 4 .*steps 2\) cannot .* 3 processes"):
        divide_batch(4, 2, 3)


def test_one_process_has_nothing_to_agree_on():
    wait_for_everyone()
    assert (process_count(), is_main(), agree(3, 0), gather("x"), share([1, 2])) == (1, True, (3, 0), ["x"], [1, 2])


@pytest.mark.parametrize(("rows", "size", "accumulation", "processes"), [(11, 4, 2, 2), (17, 2, 4, 4), (16, 4, 2, 2)])
def test_steps_hold_the_same_samples_on_any_number_of_processes(rows, size, accumulation, processes):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    def steps(count):
        each, passes = divide_batch(size, accumulation, count)
        sampler = EpochSampler(rows, 7, multiple_of=each * count if count > 1 else 1, filler=999)
        sampler.set_epoch(1)
        batches = BatchSampler(sampler, each, False)
        parts = [list(batches)]
        if count > 1:  # as accelerate divides them
            parts = [list(BatchSamplerShard(batches, count, index)) for index in range(count)]
        assert len({len(part) for part in parts}) == 1  # none waits for another
        taken = [sum(part[i : i + passes], []) for part in parts for i in range(0, len(part), passes)]
        per_part = len(taken) // count
        return [sorted(n for p in range(count) for n in taken[p * per_part + s] if n != 999) for s in range(per_part)]

    assert steps(processes) == steps(1)
    assert sorted(sum(steps(processes), [])) == list(range(rows, 2 * rows))  # the second epoch's views, each once


@pytest.fixture(scope="module")
def samples(demo_base, demo_dataset):
    tokenizer, _ = cut_tokenizer(load_tokenizer(demo_base))
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    data = ArcDataset.load_from_local_json(demo_dataset, sizes=(3,)).subset(5)
    return tokenizer, TrainingSamples(data, encoder, 512, seed=1, tp="all", rt="all")


@pytest.mark.parametrize("mask_inputs", [True, False])
@pytest.mark.parametrize("packed", [None, "transformers"])
def test_nothing_is_learned_of_what_fills_an_epoch_up(samples, mask_inputs, packed):
    tokenizer, rows = samples
    filled = FilledSamples(rows, filler=10_000)
    collator = InputMaskingDataCollator(tokenizer, mask_inputs=mask_inputs)
    collator.packed_for = packed
    made = filled.__getitems__([3, 10_000])
    assert np.array_equal(made[0]["input_ids"], rows[3]["input_ids"]) and len(made[1]["input_ids"]) == 8
    learned = int((collator(made)["labels"] != -100).sum())
    assert learned == int((collator([rows[3]])["labels"] != -100).sum()) > 0
    assert int((collator([filled[10_000]])["labels"] != -100).sum()) == 0


# --- two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_base, demo_dataset):
    """Stage 1 by one process, 12 steps of epochs that end with a smaller one; and flags of stages 1 and 2."""
    output = tmp_path_factory.mktemp("one")
    flags = (*TRAIN, "--dataset_dir", demo_dataset, "--n", 5, "--tp", "false")
    flags = (*flags, "--max_steps", 12, "--save_steps", 4)
    stage_2, flags = flags, (*flags, "--base_model", demo_base)
    alone("base_finetune.py", *flags, "--output_dir", output)
    return output, flags, stage_2


def test_two_processes_train_as_one_does(tmp_path, trained):
    printed = launch("base_finetune.py", *trained[1], "--output_dir", tmp_path)
    assert_same_training(trained[0], tmp_path)
    assert len([r for r in records(tmp_path) if "loss" in r]) == 12
    # One of them prints and writes.
    for words in (
        "float32, 2 processes)",
        "preparing ",
        "One sample",
        "estimated time",
        "trained 12 steps",
        "merge proven",
    ):
        assert printed.count(words) == 1, f"{words}\n{printed}"
    files = {path.name for path in complete_checkpoints(artifact(tmp_path, "Base-checkpoints"))[0].iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "complete.json"} <= files
    assert not list(tmp_path.glob("*.incomplete")) and not (tmp_path / ".lock.by").exists()
    merged = [load_file(artifact(part, "Base-merged") / "model.safetensors") for part in (trained[0], tmp_path)]
    assert all(torch.allclose(merged[0][name].float(), merged[1][name].float(), rtol=0.01) for name in merged[0])


def test_stage_2_with_measurements_and_packed_rows(tmp_path, trained):
    flags = (*trained[2], "--max_steps", 3, "--eval_steps", 3, "--padding_free", True)
    one, two = tmp_path / "one", tmp_path / "two"
    for output in (one, two):
        shutil.copytree(artifact(trained[0], "Base-merged"), artifact(output, "Base-merged"))
    alone("base_finetune_final.py", *flags, "--output_dir", one)
    launch_quickly("base_finetune_final.py", *flags, "--output_dir", two)
    assert_same_training(one, two, "Final-lora")


def test_a_stopped_and_killed_run_continues_with_two_and_with_one(tmp_path, trained):
    one, flags, _ = trained
    flags = (*flags, "--output_dir", tmp_path, "--save_steps", 2)
    work = artifact(tmp_path, "Base-checkpoints")
    continues = ""
    for step, number, to_all in ((2, signal.SIGTERM, True), (5, signal.SIGKILL, False)):
        process = start("base_finetune.py", *flags)
        wait_for_step(tmp_path, step, process)
        os.kill(process.pid if to_all else max(processes_of(process)), number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and not artifact(tmp_path, "Base-lora").exists(), printed
        assert continues in printed
        continues = f"continuing from {complete_checkpoints(work)[0]}"
        if number == signal.SIGKILL:
            assert "another process of this run was ended while training" in printed, printed
            continue
        # All stop at one step, and one of them says so.
        assert printed.count(f"{number.name}: stopped; the same command continues from ") == 1, printed
        kept = complete_checkpoints(work)[0]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in kept.iterdir()}
    printed = alone("base_finetune.py", *flags)
    assert continues in printed
    assert_same_training(one, tmp_path)


def test_reinforcement_learning_by_two_samples_the_same_completions(tmp_path, trained, demo_dataset):
    flags = (*GRPO, "--base_model", artifact(trained[0], "Base-merged"), "--dataset_dir", demo_dataset)
    alone("train_grpo.py", *flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one")
    more = ("--gradient_accumulation_steps", 2, "--shared_prompts", True)
    launch_quickly("train_grpo.py", *flags, *more, "--output_dir", tmp_path / "two")
    one, two = (records(tmp_path / name, "Final-RL-lora") for name in ("one", "two"))
    for name in ("num_tokens", "completions/mean_length", "completions/max_length", "reward", "eval_decodable"):
        found = [[r[name] for r in part if name in r] for part in (one, two)]
        assert found[0] and found[0] == pytest.approx(found[1]), name


def test_completions_that_stop_are_learned_from_by_two_as_by_one(tmp_path, taught_policy):
    extra = tmp_path / "programs"
    made = ("--programs", "9", "--examples", "3", "--max_side", "4", "--seed", "1")
    make_dataset.main(["--out", str(extra), *made])
    flags = (
        "--extra_dataset_dirs", extra,
        *taught_policy, "--engine", "transformers", "--sizes", 2, "--perm", False, "--max_seq_length", 160,
        "--lora_r", 8, "--num_generations", 4, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2,
        "--max_steps", 4, "--eval_steps", 0, "--save_steps", 0, "--holdout_examples", 6, "--logging_steps", 1,
        "--skip_scan", True, "--learning_rate", 0.05, "--optim", "sgd", "--max_grad_norm", 1e9, "--report_to", "none",
        "--stop_at_error", True, "--reward_cells", 0, "--micro_batch_size", 8,
        "--supervised_weight", 1, "--supervised_batch_size", 10,
    )  # fmt: skip
    alone("train_grpo.py", *flags, "--output_dir", tmp_path / "one")
    printed = launch("train_grpo.py", *flags, "--output_dir", tmp_path / "two")
    assert printed.count("puzzles more to train on") == 1
    one, two = (records(tmp_path / name, "Final-RL-lora") for name in ("one", "two"))
    for name in (
        "reward",
        "completions/mean_length",
        "supervised_loss",
        "loss",
        "grad_norm",
    ):  # groups without signal: not as many in both
        found = [[r[name] for r in part if name in r] for part in (one, two)]
        assert found[0] and found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6), name


def test_an_evaluation_by_two_finds_what_one_finds(tmp_path, trained, demo_dataset):
    flags = (
        "--models",
        artifact(trained[0], "Base-merged"),
        "--dataset_dir",
        demo_dataset,
        "--sizes",
        3,
        "--holdout_examples",
        5,
    )
    flags = (*flags, "--views", 3, "--max_new_tokens", 40)
    alone("evaluate_arc.py", *flags, "--output_dir", tmp_path / "one")
    printed = launch_quickly("evaluate_arc.py", *flags, "--output_dir", tmp_path / "two")
    assert printed.count("5 test inputs") >= 1 and printed.count("report.html") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for results in (one, two):
        for row in results["table"]:
            del row["seconds"]
    assert one["puzzles"].keys() == two["puzzles"].keys() and one["data"] == two["data"]
    for key, entry in one["puzzles"].items():
        for name in one["models"]:
            a, b = entry[name], two["puzzles"][key][name]
            for part in ("prob_truth", "prob_greedy"):
                assert a.pop(part) == pytest.approx(b.pop(part), rel=1e-4)
            assert a == b


ALIKE = """
import sys
sys.path.insert(0, ROOT)
from arc.runs.processes import fail, is_main, start, wait_for_everyone
start()
print("all are here")
wait_for_everyone()
if WAIT and is_main():
    wait_for_everyone()  # for one that never comes
if WAIT:
    raise RuntimeError("only one of them fails")
fail("what is wrong with all", 2)
"""


STOPPED = """
import sys, time
sys.path.insert(0, ROOT)
from arc.runs.processes import start, wait_for_everyone
from arc.runs.signals import StopSignals
start()
with StopSignals() as signals:
    wait_for_everyone()  # or the signal could come before the other process looks for it
    print("working", flush=True)
    while not signals.agree():
        time.sleep(0.02)
signals.end_if_received(".")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_one_process_stops_all_with_its_exit_code(tmp_path, number):
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED.replace("ROOT", repr(str(ROOT))))
    process = start(script)
    line = ""
    while "working" not in line:
        line = process.stdout.readline()
        assert line, "it ended early"
    os.kill(max(processes_of(process)), number)
    printed, _ = process.communicate(timeout=60)
    assert printed.count(f"{number.name}: stopped; no checkpoint was written") == 1, printed
    assert set(exit_codes(printed)) - {-15} == {128 + number}, printed


@pytest.mark.parametrize(
    ("wait", "said", "codes"), [(0, "what is wrong with all", {2}), (1, "RuntimeError: only one of", {1})]
)
def test_what_fails_is_said_once_and_ends_all(tmp_path, wait, said, codes):
    script = tmp_path / "alike.py"
    script.write_text(ALIKE.replace("ROOT", repr(str(ROOT))).replace("WAIT", str(wait)))
    began = time.monotonic()
    printed = launch(script, expect=1)
    assert printed.count(said) == 1 and printed.count("all are here") == 1, printed
    assert set(exit_codes(printed)) - {-15} == codes, printed  # -15: the launcher was quicker
    assert time.monotonic() - began < 30


def test_a_stage_whose_main_process_fails_ends_while_the_other_waits(tmp_path, trained):
    import filelock

    with filelock.FileLock(tmp_path / ".lock"):
        printed = launch("base_finetune.py", *trained[1], "--output_dir", tmp_path, expect=1)
    assert printed.count("is in use by another run") == 1, printed
    assert set(exit_codes(printed)) - {-15} == {2}, printed
    assert not list(tmp_path.glob("Llama*"))
