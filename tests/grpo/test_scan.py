"""The scan before reinforcement learning: which prompts are set aside, and that a continued run has the same ones."""

import json
import shutil

import numpy as np
import pytest
import torch

import train_grpo
from arc.decoding.greedy import longest_reply
from arc.grpo import scan as scan_module
from arc.grpo.prompts import PromptRows
from arc.grpo.scan import Scan, generate_samples, prompts_of_training, rows_to_scan, sampler, scan_prompts
from arc.models.loading import load_model
from arc.models.lora import add_lora
from arc.puzzles.dataset import ArcDataset
from arc.runs.settings import parse_settings
from arc.training.data import load_data
from arc.training.run import StageRun, lora_options
from tests import tiny_models
from tests.helpers import call

SMALL = (
    "--engine", "transformers", "--sizes", 2, "--perm", False, "--max_seq_length", 160, "--holdout_examples", 9,
    "--lora_r", 4, "--per_device_train_batch_size", 32, "--gradient_accumulation_steps", 1, "--temperature", 0.5,
    "--gradient_checkpointing", False, "--eval_steps", 0, "--max_steps", 4, "--scan_prompts", 48,
)  # fmt: skip


def begun(output, policy, *flags):
    """A run as train_grpo has it when it scans: model with LoRA, run, data, longest reply."""
    given = map(str, (*SMALL, *policy, "--output_dir", output, *flags))
    run = StageRun(train_grpo.STAGE, parse_settings(train_grpo.Settings, list(given)))
    data = load_data(run)
    model, _ = load_model(run.parent, run.precision)
    model = add_lora(model, run.precision, **lora_options(run.settings))
    return model, run, data, longest_reply(data.split.train, data.split.train.keys, data.tokenizer)


def kinds(data, rows):
    """The task of each row: sure, coin or never."""
    return np.array([row["key"].split("-")[0] for row in data.samples.__getitems__(rows.tolist())])


def test_a_choice_of_rows_is_seeded_and_grows_by_its_end():
    rows = rows_to_scan(1000, 200, seed=7)
    assert len(set(rows.tolist())) == 200 and rows.min() >= 0 and rows.max() < 1000
    assert np.array_equal(rows, rows_to_scan(1000, 200, seed=7))
    assert np.array_equal(rows, rows_to_scan(1000, 500, seed=7)[:200])
    assert not np.array_equal(rows, rows_to_scan(1000, 200, seed=8))
    assert sorted(rows_to_scan(50, 200, seed=7).tolist()) == list(range(50))


def test_as_many_prompts_are_scanned_as_the_steps_take():
    settings = train_grpo.Settings(
        max_steps=250, num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=2
    )
    assert prompts_of_training(settings) == 1000
    settings.scan_prompts = 10
    assert prompts_of_training(settings) == 10


def test_always_and_never_solved_prompts_are_set_aside_and_counted():
    scan = Scan(np.array([9, 4, 7, 1, 5]), np.array([0, 3, 8, 1, 0]), samples=8, seconds=2.0)
    assert scan.chosen.tolist() == [4, 1]
    assert scan.counts() == {"prompts": 5, "samples": 8, "never_solved": 2, "always_solved": 1, "learnable": 2}
    assert "5 prompts x 8 samples" in scan.describe() and "warning" not in scan.describe()
    assert "2 never and 1 always solved; trained on: 2 (40.0%)" in scan.describe()
    hopeless = Scan(np.array([9, 4]), np.array([0, 8]), samples=8)
    assert hopeless.chosen.tolist() == [9, 4]
    assert "warning: no prompt was solved sometimes" in hopeless.describe()


def test_what_the_model_knows_decides(tmp_path, taught_policy, capsys):
    model, run, data, longest = begun(tmp_path, taught_policy)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    scan = scan_prompts(model, run, data, longest)
    assert "scan: 48 prompts x 8 samples" in capsys.readouterr().out
    of = kinds(data, scan.rows)
    assert (scan.solved[of == "never"] == 0).all() and (of == "never").sum() > 4
    assert scan.solved[of == "sure"].mean() > 7.5 and 1 < scan.solved[of == "coin"].mean() < 7
    assert scan.learnable[of == "coin"].mean() > 0.8 > 0.4 > scan.learnable[of == "sure"].mean()
    # Nothing of the training has changed by it.
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    # Found again, not computed: by the same settings only.
    again = scan_prompts(None, run, data, longest)
    assert again.seconds == 0 and np.array_equal(again.solved, scan.solved)
    assert "found in the file" in capsys.readouterr().out
    [file] = run.work.glob("scan-*.json")
    whole = file.read_text()

    # Killed after some of its prompts: the rest is computed, with the same result.
    content = json.loads(whole)
    file.write_text(json.dumps(content | {"prompts": content["prompts"][:20]}))
    rest = []
    real = scan_module.sampler(model, run, data, longest)
    scan_module._scan_the_rest(scan.rows, solved := scan.solved[:20].tolist(), lambda r: rest.extend(r) or real(r), str)
    assert solved == scan.solved.tolist() and rest == scan.rows[20:].tolist()
    assert np.array_equal(scan_prompts(model, run, data, longest).solved, scan.solved)
    assert file.read_text() == whole

    # A file that is not what it should be is said and made anew.
    for damaged in (whole[:100], "[]", whole.replace('"solved": ', '"solved": 9'), whole.replace("sha", "x") + "x"):
        file.write_text(damaged)
        assert np.array_equal(scan_prompts(model, run, data, longest).solved, scan.solved)
        assert "it is not used, and written anew" in capsys.readouterr().out
        assert file.read_text() == whole
    # The share of permuted colours is part of what a scan is of, unless it is all: older scans say nothing of it.
    views = data.samples.views
    identity = scan_module.scan_identity(run, data, scan.rows, longest, False)
    assert views.perm_share == 1 and len(identity["views"]) == 6
    views.perm_share = 0.5
    assert scan_module.scan_identity(run, data, scan.rows, longest, False)["views"] == [*identity["views"], 0.5]
    views.perm_share = 1.0
    # Other settings are other scans, and leave this one alone.
    for name, value in (("temperature", 0.7), ("seed", 45), ("scan_samples", 4), ("scan_prompts", 9)):
        setattr(run.settings, name, value)
        assert scan_prompts(model, run, data, longest).samples == run.settings.scan_samples
    assert file.read_text() == whole and len(list(run.work.glob("scan-*.json"))) == 5


def test_the_plain_copy_of_fast_rollouts_finds_the_same(tmp_path, taught_policy):
    model, run, data, longest = begun(tmp_path, taught_policy)
    rows = rows_to_scan(len(data.samples), 24, 1).tolist()
    direct = sampler(model, run, data, longest)(rows)
    assert sampler(model, run, data, longest, from_copy=True)(rows) == direct


def test_a_models_own_generate_samples_the_same_distribution(tmp_path, taught_policy):
    # The way of the Unsloth engine, on a model of transformers.
    model, run, data, longest = begun(tmp_path, taught_policy)
    coins = np.flatnonzero(kinds(data, np.arange(len(data.samples))) == "coin")[:2]
    keys = [row["key"] for row in data.samples.__getitems__(coins.tolist())]
    prompts = [row["input_ids"] for row in data.encoder.encode(data.split.train, keys, reply=False)]
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        found = generate_samples(
            model, "transformers", data.tokenizer, prompts, max_new_tokens=longest, samples=400, temperature=0.5,
            seed=seed, batch_size=100,
        )  # fmt: skip
        assert [len(of_prompt) for of_prompt in found] == [400, 400]
        drawn.append([tuple(reply.tolist()) for of_prompt in found for reply in of_prompt])
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(state, torch.random.get_rng_state())
    run.settings.scan_samples = 400
    for at, solved in enumerate(sampler(model, run, data, longest)(coins.tolist())):
        texts = data.tokenizer.batch_decode([list(reply) for reply in drawn[0][400 * at : 400 * at + 400]])
        decoded = [data.split.train.decode(t, "\n", key=keys[at], reply_end=data.format["reply_end"]) for t in texts]
        assert abs(sum(correct for _, correct, _ in decoded) - solved) < 4 * np.sqrt(
            2 * 400 * 0.25
        )  # 4 standard errors


def test_further_epochs_hold_the_chosen_puzzles_in_other_views(tmp_path, taught_policy):
    _, _, data, _ = begun(tmp_path, (*taught_policy, "--perm", True))
    chosen = np.array([11, 3, 40])
    rows = PromptRows(data, chosen).__getitems__([0, 1, 2, 3, 4, 5])
    first = data.samples.__getitems__([11, 3, 40])
    assert [row["key"] for row in rows[:3]] == [row["key"] for row in first]
    for one, later in zip(rows[:3], rows[3:], strict=True):
        same, other = one["key"].split(".perm"), later["key"].split(".perm")
        assert same[0] == other[0] and same[1] != other[1]  # puzzle and symmetry; colours and order
        assert ArcDataset.get_base_key(later["key"]) == ArcDataset.get_base_key(one["key"])


def test_the_script_trains_on_what_is_left_and_a_continued_run_does_not_scan_again(tmp_path, taught_policy):
    flags = (*SMALL, *taught_policy, "--output_dir", tmp_path, "--save_steps", 2)
    code, printed = call("train_grpo", *flags)
    assert code == 0 and "scan: 48 prompts" in printed, printed
    lora, work = tmp_path / "Llama-3.2-1B-Final-RL-lora", tmp_path / "Llama-3.2-1B-Final-RL-checkpoints"
    found = json.loads((lora / "manifest.json").read_text())["scan"]
    assert found["prompts"] == 48 and found["learnable"] < 40 and found["never_solved"] > 4
    assert f"trained on: {found['learnable']}" in printed
    once = (lora / "adapter_model.safetensors").read_bytes()
    [file] = work.glob("scan-*.json")
    written = file.stat().st_mtime_ns
    for folder in (lora, tmp_path / "Llama-3.2-1B-Final-RL-merged", work / "checkpoint-4"):
        shutil.rmtree(folder)
    # What decides which prompts there are may not change on the way.
    for other in (("--scan_samples", 4), ("--scan_prompts", 40), ("--skip_scan",)):
        code, printed = call("train_grpo", *flags, *other)
        assert code == 2 and f"checkpoints of a run with other settings ({other[0][2:]})" in printed, printed
    code, printed = call("train_grpo", *flags)
    assert code == 0 and "found in the file of an earlier run" in printed and "continuing from" in printed
    assert file.stat().st_mtime_ns == written
    assert (lora / "adapter_model.safetensors").read_bytes() == once


def test_without_signal_all_are_used_with_a_warning_and_skipping_is_said(tmp_path, taught_policy):
    untaught = tiny_models.prepared_base(tmp_path)
    flags = (*SMALL, *taught_policy[:2], "--base_model", untaught, "--max_steps", 1, "--save_steps", 0)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path / "warned")
    assert code == 0 and "warning: no prompt was solved sometimes" in printed, printed
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path / "skipped", "--skip_scan")
    assert code == 0 and "scan: skipped; all prompts are used" in printed, printed
    manifest = json.loads((tmp_path / "skipped" / "Llama-3.2-1B-Final-RL-lora" / "manifest.json").read_text())
    assert manifest["scan"] is None
    assert not list((tmp_path / "skipped").glob("*/scan-*.json"))


@pytest.mark.parametrize("flags", [("--scan_samples", 1), ("--scan_prompts", 0)])
def test_settings_that_cannot_be_are_refused(tmp_path, taught_policy, flags):
    code, printed = call("train_grpo", *SMALL, *taught_policy, "--output_dir", tmp_path / "output", *flags)
    assert code == 2 and f"{flags[0]} is {flags[1]}: expected a whole number from" in printed
    assert not (tmp_path / "output").exists()
