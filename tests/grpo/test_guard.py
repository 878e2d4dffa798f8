"""The guard of reinforcement learning: its rules, the best adapter, and a collapse that is provoked."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

import train_grpo
from arc.grpo.guard import (
    CLIMBING,
    PolicyGuard,
    climb,
    fall_probability,
    has_fallen,
    load_weights,
    mean_divergence,
    read_weights,
    trained_weights,
    write_weights,
)
from arc.models.loading import Precision, load_model
from arc.models.lora import add_lora
from arc.runs.settings import parse_settings
from arc.training.curves import plot_metrics, read_metrics
from arc.training.data import load_data
from arc.training.run import StageRun
from tests import tiny_models
from tests.helpers import call

SMALL = (
    "--engine", "transformers", "--sizes", 2, "--perm", False, "--max_seq_length", 160, "--holdout_examples", 15,
    "--lora_r", 4, "--per_device_train_batch_size", 32, "--gradient_accumulation_steps", 1, "--temperature", 0.5,
    "--gradient_checkpointing", False, "--scan_prompts", 40, "--eval_puzzles", 15, "--warmup_ratio", 0,
    "--lr_scheduler_type", "constant",
)  # fmt: skip
COLLAPSE = ("--learning_rate", 0.3, "--max_steps", 30)


@pytest.fixture(scope="module")
def policy(taught_policy):
    return (*SMALL, *taught_policy)


def artifact(output, name):
    return output / f"Llama-3.2-1B-Final-RL-{name}"


def adapter(output):
    return load_file(artifact(output, "lora") / "adapter_model.safetensors")


def manifest(output):
    return json.loads((artifact(output, "lora") / "manifest.json").read_text())["policy"]


# -- the rules


@pytest.mark.parametrize(
    ("both", "lost", "gained", "probability"),
    [
        (5, 0, 0, 1.0),
        (0, 1, 0, 0.5),
        (0, 0, 3, 1.0),
        (9, 6, 0, 1 / 64),
        (9, 7, 0, 1 / 128),
        (0, 10, 3, (286 + 78 + 13 + 1) / 8192),  # 13 over 10, 11, 12 and 13
        (0, 5, 5, 638 / 1024),
    ],
)
def test_a_fall_is_judged_by_the_puzzles_that_changed(both, lost, gained, probability):
    best = [True] * both + [True] * lost + [False] * gained + [False] * 4
    now = [True] * both + [False] * lost + [True] * gained + [False] * 4
    assert fall_probability(best, now) == pytest.approx(probability)
    assert has_fallen(best, now) is (probability < 0.01)


def test_measurements_of_one_policy_seldom_look_like_a_fall():
    # The best of five measurements against each of the others, where nothing has changed: 40% solved, half of the
    # puzzles by chance.
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        known = rng.random(64) < 0.5
        measured = [known & (rng.random(64) < 0.8) for _ in range(6)]
        best = max(measured[:5], key=np.sum)
        alarms += any(has_fallen(best.tolist(), now.tolist()) for now in measured)
    assert alarms <= 0.05 * 400


@pytest.mark.parametrize(
    ("shares", "groups", "climbed"),
    [
        ([], 4, False),
        ([0.0] * 8, 4, False),  # nothing before them
        ([1.0] * 40, 4, False),  # high, but it always was
        ([0.9] * 20 + [0.1] * 20, 4, False),
        ([0.0] * 16 + [0.1] * 8, 400, False),  # clear, and of no weight
        ([0.0] * 16 + [0.4] * 8, 4, True),
        ([0.2] * 16 + [0.5] * 8, 4, False),  # may be chance
        ([0.2] * 16 + [0.5] * 8, 16, True),
        ([0.0] * 30 + [1.0], 4, False),  # one line
        ([0.0] * 30 + [1.0] * 4, 4, True),
        ([0.0] * 8 + [i / 200 for i in range(200)], 4, True),  # slowly
        ([0.0] + [1.0] * 8, 4, True),  # at once
        ([0.0] + [1.0] * 8, 2, False),  # too few prompts, until there are 16 lines of them
        ([0.0] + [1.0] * 16, 2, True),
    ],
)
def test_a_climb_is_large_and_clear(shares, groups, climbed):
    assert (climb(shares, groups) is not None) is climbed


@pytest.mark.parametrize("groups", [2, 4])
def test_a_share_that_stays_is_no_climb_however_alike_the_completions_of_a_group_are(groups):
    rng = np.random.default_rng(0)
    alarms = 0
    for share in (0.05, 0.3, 0.5):
        for _ in range(50):
            lines = (rng.random((250, groups)) < share).mean(axis=1).tolist()  # all completions of a group or none
            alarms += any(climb(lines[:end], groups) for end in range(1, 251))
    assert alarms <= 0.04 * 150


# -- weights and divergence


def small_model(folder, **more):
    precision = Precision("transformers", "float32", False)
    model, tokenizer = load_model(tiny_models.prepared_base(folder), precision)
    return add_lora(model, precision, r=4, gradient_checkpointing=False, **more), tokenizer, precision


def test_weights_come_back_bit_for_bit_and_only_into_their_own_model(tmp_path):
    model, _, precision = small_model(tmp_path)  # with embeddings: one tied, shared matrix
    ids = torch.arange(40).reshape(2, 20) % 70
    tiny_models.train_a_little(model, precision, ids, steps=2)
    kept, logits = trained_weights(model), tiny_models.logits_of(model, ids)
    tiny_models.train_a_little(model, precision, ids, steps=2)
    assert not torch.equal(tiny_models.logits_of(model, ids), logits)
    write_weights(kept, tmp_path / "best-2.safetensors")
    load_weights(model, read_weights(tmp_path / "best-2.safetensors"))
    assert torch.equal(tiny_models.logits_of(model, ids), logits)
    with pytest.raises(ValueError, match="are of another model: .* differs"):
        load_weights(model, dict(list(kept.items())[1:]))
    with pytest.raises(FileNotFoundError, match="best-3.safetensors is missing"):
        read_weights(tmp_path / "best-3.safetensors")
    (tmp_path / "best-3.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="best-3.safetensors cannot be read"):
        read_weights(tmp_path / "best-3.safetensors")


def test_the_divergence_to_the_start_is_that_of_plain_forward_passes(tmp_path):
    model, _, precision = small_model(tmp_path)
    rows = [(np.arange(5, 25), np.arange(30, 36)), (np.arange(2, 9), np.arange(40, 43))]
    assert mean_divergence(model, "transformers", rows) == 0  # LoRA begins as nothing
    start = [tiny_models.logits_of(model, torch.from_numpy(np.concatenate(row))[None])[0] for row in rows]
    tiny_models.train_a_little(model, precision, torch.arange(40).reshape(2, 20) % 70, steps=2)
    sums = 0.0
    for (prompt, reply), before in zip(rows, start, strict=True):
        now = tiny_models.logits_of(model, torch.from_numpy(np.concatenate([prompt, reply]))[None])[0]
        places = slice(len(prompt) - 1, len(prompt) + len(reply) - 1)
        sums += tiny_models.divergence(now[places], before[places]) * len(reply)
    model.train()
    assert mean_divergence(model, "transformers", rows) == pytest.approx(sums / 9, rel=1e-4)
    assert sums > 0.01 and model.training


# -- whole runs


def test_a_collapse_is_stopped_and_the_best_adapter_saved(tmp_path, policy):
    flags = (*policy, *COLLAPSE, "--eval_steps", 2, "--save_steps", 2, "--output_dir", tmp_path)
    code, printed = call("train_grpo", *flags)
    assert code == 0, printed
    kept = manifest(tmp_path)
    assert "held-out puzzles get a grid as their answer" in kept["stopped"] or "are solved" in kept["stopped"]
    assert f"stopped after step {kept['last_step']}: {kept['stopped']}" in printed
    assert kept["step"] < kept["last_step"] < 30 and kept["heldout_puzzles"] == 15 and kept["heldout_solved"] >= 5
    assert f"kept: the adapter of step {kept['step']} of {kept['last_step']}" in printed
    # What is saved is that adapter, and not the last one.
    work = artifact(tmp_path, "checkpoints")
    best = read_weights(work / f"best-{kept['step']}.safetensors")
    saved = adapter(tmp_path)
    assert {n.replace(".default", "") for n in best} == set(saved)
    assert all(torch.equal(saved[name.replace(".default", "")], tensor) for name, tensor in best.items())
    last = load_file(work / f"checkpoint-{kept['last_step']}" / "adapter_model.safetensors")
    assert not all(torch.equal(last[name], saved[name]) for name in saved)
    records = read_metrics(artifact(tmp_path, "lora") / "metrics.jsonl")
    measured = {r["step"]: r for r in records if "eval_exact_match" in r}
    assert measured[kept["step"]]["eval_exact_match"] == kept["heldout_solved"] / 15
    assert measured[kept["last_step"]]["eval_exact_match"] < kept["heldout_solved"] / 15
    assert measured[0]["eval_kl"] == 0 < 0.1 < measured[kept["last_step"]]["eval_kl"]

    # Stopped, but the adapter is lost: it is made again from the checkpoints without one step more.
    for name in ("lora", "merged"):
        shutil.rmtree(artifact(tmp_path, name))
    part = work / "checkpoint-1"  # as a run leaves it that is killed while it deletes an older one
    part.mkdir()
    (part / "optimizer.pt").write_bytes(b"1")
    code, printed = call("train_grpo", *flags)
    assert code == 0 and "continuing from" in printed and "steps to step" not in printed
    assert not part.exists()
    assert manifest(tmp_path) == kept
    assert all(torch.equal(tensor, adapter(tmp_path)[name]) for name, tensor in saved.items())


def test_a_run_that_was_killed_ends_with_the_same_best_adapter(tmp_path, policy):
    # A rate at which it breaks down after some steps; measured and saved at every one of them.
    flags = (*policy, "--learning_rate", 0.01, "--max_steps", 8, "--eval_steps", 1, "--save_steps", 1)
    flags = (*flags, "--save_total_limit", 9)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path / "whole")
    assert code == 0, printed
    kept, saved = manifest(tmp_path / "whole"), adapter(tmp_path / "whole")
    work = artifact(tmp_path / "whole", "checkpoints")
    last = kept["last_step"]
    assert last >= 3
    killed_after = min(kept["step"], last - 1)  # what comes after it is worse: the best is known from its file alone
    output = tmp_path / "killed"
    shutil.copytree(work, artifact(output, "checkpoints"))
    for step in range(killed_after + 1, last + 1):
        shutil.rmtree(artifact(output, "checkpoints") / f"checkpoint-{step}", ignore_errors=True)
    # What the killed run had found after that checkpoint is not known to it.
    for file in artifact(output, "checkpoints").glob("best-*.safetensors"):
        if int(file.stem.split("-")[1]) > killed_after:
            file.write_bytes(b"of another life")
    code, printed = call("train_grpo", *flags, "--output_dir", output)
    assert code == 0 and f"checkpoint-{killed_after}" in printed, printed
    assert manifest(output) == kept
    assert all(torch.equal(tensor, adapter(output)[name]) for name, tensor in saved.items())
    # Measurements decide what is kept: they may not change on the way.
    shutil.rmtree(artifact(output, "lora"))
    shutil.rmtree(artifact(output, "merged"))
    code, printed = call("train_grpo", *flags, "--output_dir", output, "--eval_steps", 3)
    assert code == 2 and "checkpoints of a run with other settings (eval_steps)" in printed
    # A best adapter that is gone is said.
    shutil.rmtree(artifact(output, "checkpoints") / f"checkpoint-{last}")
    for file in artifact(output, "checkpoints").glob("best-*.safetensors"):
        file.unlink()
    code, printed = call("train_grpo", *flags, "--output_dir", output)
    assert code == 0 and "is lost" in printed and "the search begins anew" in printed


def test_only_files_that_a_checkpoint_names_stay(tmp_path, policy):
    flags = (*policy, "--max_steps", 5, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 2)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path)
    assert code == 0, printed
    work = artifact(tmp_path, "checkpoints")
    named = {
        json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["policy_guard"]["best"]["step"]
        for folder in work.glob("checkpoint-*")
    }
    there = {int(path.stem.split("-")[1]) for path in work.glob("best-*.safetensors")}
    assert named <= there and len(there) <= 3  # the one of the checkpoint that went last may still be there


@pytest.mark.parametrize("name", CLIMBING)
def test_completions_that_break_down_stop_it_where_nothing_is_held_out(tmp_path, policy, name, capsys):
    given = map(str, (*policy, "--eval_steps", 0, "--output_dir", tmp_path))
    run = StageRun(train_grpo.STAGE, parse_settings(train_grpo.Settings, list(given)))
    guard = PolicyGuard(None, run, load_data(run))
    assert not guard.prompts
    state, stopped = TrainerState(max_steps=60), []
    for step in range(1, 61):
        control = TrainerControl()
        state.global_step = step
        guard.end_step(state, control)
        if control.should_training_stop:
            assert control.should_save and control.should_log
            stopped.append(step)
            break
        state.log_history.append({"step": step, "loss": 0.0, name: 0.05 if step < 30 else 0.9})
    assert stopped and 32 <= stopped[0] <= 38  # 4 prompts a step: some steps are needed, not many
    assert f"stopped after step {stopped[0]}: {CLIMBING[name]}" in capsys.readouterr().out
    # The checkpoint says so to whoever continues.
    assert guard.state() == {"best": None, "reason": guard.reason} == state.stateful_callbacks["policy_guard"]


def test_without_the_guard_the_last_adapter_is_saved(tmp_path, policy):
    flags = (*policy, *COLLAPSE, "--max_steps", 4, "--eval_steps", 2, "--save_steps", 4, "--collapse_guard", False)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path)
    assert code == 0 and "stopped after" not in printed, printed
    assert manifest(tmp_path) == {
        "step": 4, "last_step": 4, "heldout_solved": None, "heldout_puzzles": 15, "stopped": None,
    }  # fmt: skip
    assert not list(artifact(tmp_path, "checkpoints").glob("best-*"))
    last = load_file(artifact(tmp_path, "checkpoints") / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in adapter(tmp_path).items())


@pytest.mark.parametrize("extra", [("--fast_rollouts", True), ("--beta", 0.1), ("--load_in_4bit", True)])
def test_figures_are_in_the_log_and_the_picture(tmp_path, policy, extra):
    flags = (*policy, "--learning_rate", 1e-3, "--max_steps", 2, "--eval_steps", 1, "--save_steps", 0, *extra)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path)
    assert code == 0, printed
    records = read_metrics(artifact(tmp_path, "lora") / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert len(steps) == 2
    for record in steps:
        assert {
            "reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/clipped_ratio",
            "completions/repetition", "completions/repetition_excess",
            *(f"rewards/{n}/mean" for n in ("exact_match", "cell_accuracy", "right_shape", "well_formed")),
        } <= set(record)  # fmt: skip
        paid = 0.9 * record["rewards/exact_match/mean"] + 0.1 * record["rewards/cell_accuracy/mean"]
        assert record["reward"] == pytest.approx(paid, abs=1e-6)
        assert ("kl" in record) is ("--beta" in extra)
    measured = [r for r in records if "eval_exact_match" in r]
    assert [r["step"] for r in measured] == [0, 1, 2]
    assert all({"eval_decodable", "eval_repetition", "eval_kl"} <= set(r) for r in measured)
    picture = tmp_path / "again.png"
    plot_metrics(artifact(tmp_path, "lora") / "metrics.jsonl", picture)
    from matplotlib.image import imread

    height, width = imread(picture).shape[:2]
    assert abs(width / height - 13.5 / 6.4) < 0.01  # six panels in two rows


def test_the_guard_asks_nothing_of_a_dataset_without_held_out_puzzles(tmp_path, policy):
    flags = (*policy, "--holdout_examples", 0, "--max_steps", 1, "--save_steps", 0, "--output_dir", tmp_path)
    code, printed = call("train_grpo", *flags)
    assert code == 0 and manifest(tmp_path)["heldout_puzzles"] == 0, printed
