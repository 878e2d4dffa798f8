"""What a stage does about what is there already: whole, damaged, outdated, made elsewhere, or in use."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from arc.models.manifests import read_manifest, write_manifest
from arc.runs import lock as lock_module
from arc.runs.lock import OutputLock
from arc.training.run import StageRun
from tests.helpers import call
from tests.scripts.test_stages import GRPO, SFT, artifact, contents

FAST = ("--max_steps", 2, "--eval_steps", 0, "--lora_r", 4, "--merge_base", "quantised")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_base, demo_dataset):
    """An output folder with all three stages done in very few steps, and the flags that did it."""
    output = tmp_path_factory.mktemp("finished") / "output"
    flags = {
        "base_finetune": (*SFT, *FAST, "--base_model", demo_base, "--dataset_dir", demo_dataset),
        "base_finetune_final": (*SFT, *FAST, "--dataset_dir", demo_dataset),
        "train_grpo": (*GRPO, *FAST, "--dataset_dir", demo_dataset),
    }
    for script, given in flags.items():
        code, printed = call(script, *given, "--output_dir", output)
        assert code == 0, printed
    return output, flags


@pytest.fixture
def done(tmp_path, finished):
    """A copy of the finished output, to be harmed, and a way to run a stage on it."""
    output = tmp_path / "output"
    shutil.copytree(finished[0], output)
    return output, lambda script, *more: call(script, *finished[1][script], "--output_dir", output, *more)


def test_a_finished_stage_is_skipped_whatever_does_not_decide_its_weights(done):
    output, again = done
    before = contents(output)
    for script in ("base_finetune", "base_finetune_final", "train_grpo"):
        more = ("--logging_steps", 7, "--save_steps", 9)
        if script != "train_grpo":  # where measurements choose the adapter
            more = (*more, "--eval_puzzles", 1, "--eval_steps", 1)
        code, printed = again(script, *more)
        assert code == 0 and "training skipped" in printed and "merge skipped" in printed, printed
    assert contents(output) == before


def test_puzzles_of_more_folders_are_other_puzzles(done, tmp_path, demo_dataset):
    folder = tmp_path / "more"
    folder.mkdir()
    pairs = [{"input": [[9, n % 9, n // 9]], "output": [[n % 9]]} for n in range(9)]
    (folder / "another.json").write_text(json.dumps(pairs), encoding="utf-8")
    output, again = done
    code, printed = again("base_finetune", "--extra_dataset_dirs", folder)
    assert code == 2 and f"other settings: extra_dataset_dirs (was not set, is {folder}); " in printed, printed
    code, printed = again("base_finetune", "--extra_dataset_dirs", tmp_path / "gone")
    assert code == 2 and "--extra_dataset_dirs: " in printed and "gone: no such folder" in printed, printed
    # Trained with a folder that is gone now, or holds other puzzles.
    lora = artifact(output, "Base-lora")
    manifest = read_manifest(lora)
    manifest["settings"]["extra_dataset_dirs"] = [str(tmp_path / "gone"), str(folder)]
    write_manifest(lora, manifest)
    code, printed = again("base_finetune", "--extra_dataset_dirs", tmp_path / "gone", folder)
    assert code == 0 and "gone is gone, so that the puzzles" in printed and "training skipped" in printed, printed
    shutil.copytree(folder, tmp_path / "gone")
    (tmp_path / "gone" / "another.json").rename(tmp_path / "gone" / "others.json")
    code, printed = again("base_finetune", "--extra_dataset_dirs", tmp_path / "gone", folder)
    folders = f"{demo_dataset}, {tmp_path / 'gone'}, {folder}"
    assert code == 2 and f"other settings: the puzzles in {folders}; " in printed, printed


@pytest.mark.parametrize(
    ("script", "more", "words"),
    [
        ("base_finetune", ("--learning_rate", 5e-4), "Base-lora was trained with other settings: learning_rate (was"),
        ("base_finetune", ("--n", 9), "n (was not set, is 9)"),
        ("base_finetune", ("--dtype", "bfloat16"), "dtype (was float32, is bfloat16)"),
        ("base_finetune", ("--full_vocab", True), "prepared was prepared from"),
        ("base_finetune_final", ("--mask_first_n_examples", 0), "mask_first_n_examples (was 1, is 0)"),
        ("train_grpo", ("--temperature", 0.5), "temperature (was 1.0, is 0.5)"),
        ("train_grpo", ("--eval_steps", 1), "eval_steps (was 0, is 1)"),
    ],
)
def test_other_settings_are_an_error_that_names_them(done, script, more, words):
    output, again = done
    before = contents(output)
    code, printed = again(script, *more)
    assert code == 2 and words in printed and "--overwrite" in printed, printed
    assert contents(output) == before


def test_other_puzzles_are_an_error(done, tmp_path, demo_dataset):
    dataset = tmp_path / "dataset"
    shutil.copytree(demo_dataset, dataset)
    code, printed = done[1]("base_finetune", "--dataset_dir", dataset)
    assert code == 0, printed  # the same puzzles in another place
    file = sorted(dataset.glob("*.json"))[0]
    file.write_text(json.dumps(json.loads(file.read_text())[:-6]))
    code, printed = done[1]("base_finetune", "--dataset_dir", dataset)
    assert code == 2 and f"the puzzles in {dataset}" in printed
    code, printed = done[1]("base_finetune", "--dataset_dir", tmp_path / "gone")
    assert code == 0, printed  # what is not at hand cannot be compared


def test_overwrite_moves_an_outdated_adapter_aside_and_trains_anew(done):
    output, again = done
    before = load_file(artifact(output, "Base-lora") / "adapter_model.safetensors")
    code, printed = again("base_finetune", "--seed", 7, "--overwrite")
    assert code == 0 and "trained 2 steps" in printed, printed
    aside = load_file(output / "Llama-3.2-1B-Base-lora.old-1" / "adapter_model.safetensors")
    assert all(torch.equal(before[name], aside[name]) for name in before)
    assert {p.name for p in output.iterdir() if "old" in p.name} == {
        f"Llama-3.2-1B-Base-{kind}.old-1" for kind in ("lora", "merged", "checkpoints")
    }
    # Everything that was made from the old one says so, through the whole chain.
    for script, words in (
        ("base_finetune_final", "was trained from another model than the one that is in"),
        ("train_grpo", "Final-lora was made from another Llama-3.2-1B-Base-merged"),
    ):
        code, printed = again(script)
        assert code == 2 and words in printed and "--overwrite" in printed, printed
        assert script == "base_finetune_final" or "run base_finetune_final.py again, as it was run" in printed, printed
    code, printed = again("base_finetune_final", "--overwrite")
    assert code == 0 and "trained 2 steps" in printed, printed
    code, printed = again("base_finetune", "--seed", 7)
    assert code == 0 and "training skipped" in printed, printed


def test_the_same_training_again_is_the_same_artifact(done):
    output, again = done
    for kind in ("lora", "merged", "checkpoints"):
        shutil.rmtree(artifact(output, f"Base-{kind}"))
    assert again("base_finetune")[0] == 0
    code, printed = again("train_grpo")  # made anew with the same result: nothing is outdated
    assert code == 0 and "training skipped" in printed, printed


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_damage_is_an_error_and_overwrite_makes_it_anew(done, kind):
    output, again = done
    file = next(artifact(output, f"Final-{kind}").glob("*model.safetensors"))
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}  # no map of what is truncated
    os.truncate(file, file.stat().st_size - 1)
    before = contents(output)
    code, printed = again("base_finetune_final")
    assert code == 2 and f"Final-{kind} is damaged: {file.name} has" in printed and "--overwrite" in printed, printed
    assert contents(output) == before
    code, printed = again("base_finetune_final", "--overwrite")
    # The adapter is made again from the last checkpoint, without a step more, and its merge still fits.
    assert code == 0 and ("continuing from" in printed) == (kind == "lora"), printed
    assert "trained 2 steps" not in printed and ("merge skipped" in printed) == (kind == "lora"), printed
    again_whole = load_file(file)
    assert all(torch.equal(whole[name], again_whole[name]) for name in whole)


def test_a_stage_does_not_start_from_a_damaged_parent(done):
    output, again = done
    for name in ("Final-lora", "Final-merged", "Final-checkpoints"):
        shutil.rmtree(artifact(output, name))
    file = artifact(output, "Base-merged") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, printed = again("base_finetune_final")
    assert code == 2 and "Base-merged is damaged: model.safetensors is not the file that was written" in printed
    assert "base_finetune.py" in printed and "--overwrite" in printed


def test_a_changed_base_makes_the_prepared_one_outdated(done, tmp_path, demo_base):
    output, again = done
    base = tmp_path / "base"
    shutil.copytree(demo_base, base)
    code, printed = again("base_finetune", "--base_model", base)
    assert code == 0 and "training skipped" in printed, printed  # the same model in another place
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    code, printed = again("base_finetune", "--base_model", base)
    assert code == 2 and "prepared was prepared from" in printed and "--overwrite" in printed, printed
    code, printed = again("base_finetune", "--base_model", base, "--overwrite")
    assert code == 0 and "preparing" in printed and (output / "Llama-3.2-1B-prepared.old-1").is_dir(), printed


def test_another_merge_base_is_merged_anew_only_where_it_matters(done):
    code, printed = done[1]("base_finetune", "--merge_base", "original")
    assert code == 0 and "merge skipped" in printed, printed  # trained on 16-bit weights: there is one base


def test_another_merge_base_of_a_4_bit_adapter(tmp_path, demo_base, demo_dataset):
    flags = (*SFT, *FAST, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", tmp_path)
    flags = (*flags, "--load_in_4bit", True)
    assert call("base_finetune", *flags)[0] == 0
    code, printed = call("base_finetune", *flags, "--merge_base", "original")
    assert code == 2 and "was merged with --merge_base quantised, asked for is original" in printed, printed
    code, printed = call("base_finetune", *flags, "--merge_base", "original", "--overwrite")
    assert code == 0 and "training skipped" in printed and "merged onto the 16-bit base" in printed, printed
    assert read_manifest(artifact(tmp_path, "Base-merged"))["merge_base"] == "original"
    assert (tmp_path / "Llama-3.2-1B-Base-merged.old-1").is_dir()


def test_artifacts_made_elsewhere_are_looked_through_and_used(done):
    output, again = done
    for name in ("prepared", "Base-lora", "Base-merged"):
        (artifact(output, name) / "manifest.json").unlink()
    code, printed = again("base_finetune")
    assert code == 0 and "training skipped" in printed and "merge skipped" in printed, printed
    assert printed.count("made elsewhere") >= 2
    os.truncate(artifact(output, "Base-lora") / "adapter_model.safetensors", 100)
    code, printed = again("base_finetune")
    assert code == 2 and "adapter_model.safetensors cannot be read" in printed, printed


def test_a_merge_without_its_adapter_is_an_error(done):
    output, again = done
    shutil.rmtree(artifact(output, "Base-lora"))
    code, printed = again("base_finetune")
    assert code == 2 and "Base-merged is there without" in printed and "--overwrite" in printed, printed


def test_a_second_run_on_one_output_folder_stops_before_it_writes(done):
    output, again = done
    shutil.rmtree(artifact(output, "Base-merged"))
    lock = OutputLock(output, "train_grpo.py")
    lock.acquire()
    before = {name: state for name, state in contents(output).items() if not name.endswith(lock_module.LOCK)}
    code, printed = again("base_finetune")
    assert code == 2 and "output is in use by train_grpo.py (process" in printed, printed
    after = {name: state for name, state in contents(output).items() if not name.endswith(lock_module.LOCK)}
    assert after == before
    lock.release()
    assert again("base_finetune")[0] == 0


def test_checkpoints_of_other_settings_are_refused_or_moved_aside(done):
    output, again = done
    for name in ("Base-lora", "Base-merged"):
        shutil.rmtree(artifact(output, name))
    code, printed = again("base_finetune", "--lora_alpha", 3)
    assert code == 2 and "checkpoints of a run with other settings (lora_alpha" in printed, printed
    code, printed = again("base_finetune", "--lora_alpha", 3, "--overwrite")
    assert code == 0 and "trained 2 steps" in printed, printed
    assert (output / "Llama-3.2-1B-Base-checkpoints.old-1").is_dir()


def test_a_merge_that_fails_its_proof_is_not_kept(done, monkeypatch):
    from arc.merging import merge as merge_module

    output, again = done
    shutil.rmtree(artifact(output, "Base-merged"))
    real = merge_module.merge_adapter

    def forgetful(adapter, out, **options):
        found = real(adapter, out, **options)
        shutil.copy(artifact(output, "prepared") / "model.safetensors", out / "model.safetensors")
        return found

    monkeypatch.setattr(merge_module, "merge_adapter", forgetful)
    before = contents(artifact(output, "Base-lora"))
    code, printed = again("base_finetune")
    assert code == 1 and "error: the merge of" in printed and "failed its proof and was not kept" in printed, printed
    assert "Traceback" not in printed and "The adapter is as it was" in printed
    assert not artifact(output, "Base-merged").exists() and not list(output.glob("*.incomplete"))
    assert contents(artifact(output, "Base-lora")) == before
    monkeypatch.setattr(merge_module, "merge_adapter", real)
    code, printed = again("base_finetune")
    assert code == 0 and "merge proven" in printed, printed
    check = read_manifest(artifact(output, "Base-merged"))["check"]
    assert check["kl"] <= check["kl_bound"] and check["prompts"] == 8 and check["trained_top1"] == 1.0


def test_stray_files_make_nothing_outdated(done, tmp_path, demo_base):
    output, again = done
    base = tmp_path / "base"
    shutil.copytree(demo_base, base)
    for name in ("prepared", "Base-lora", "Base-merged", "Base-checkpoints"):
        shutil.rmtree(artifact(output, name))
    assert again("base_finetune", "--base_model", base)[0] == 0
    (base / ".cache" / "huggingface").mkdir(parents=True)
    for place in (base, base / ".cache" / "huggingface", artifact(output, "Base-merged")):
        (place / "notes.txt").write_text("a note")
    (base / "README.md").write_text("changed")
    for script in ("base_finetune", "base_finetune_final"):
        more = ("--base_model", base) if script == "base_finetune" else ()
        code, printed = again(script, *more)
        assert code == 0 and "training skipped" in printed and "merge skipped" in printed, printed


def test_training_is_not_lost_to_a_probe_or_a_picture(done, monkeypatch):
    output, again = done
    for kind in ("lora", "merged", "checkpoints"):
        shutil.rmtree(artifact(output, f"Base-{kind}"))

    def fails(*_, **__):
        raise TypeError("a library has changed")

    monkeypatch.setattr("arc.training.run.record_probe", fails)
    monkeypatch.setattr("arc.training.curves.plot_metrics", fails)
    code, printed = again("base_finetune", "--save_steps", 0)
    assert code == 0 and "merge proven" in printed, printed
    assert "note: what the trained model answers is not recorded (TypeError: a library has changed)" in printed
    assert read_manifest(artifact(output, "Base-merged"))["check"]["trained_kl"] is None
    monkeypatch.undo()
    code, printed = again("train_grpo")  # the same weights, with or without: nothing is outdated
    assert code == 0 and "training skipped" in printed, printed


def test_an_interrupted_run_whose_prepared_base_is_gone_prepares_it_again_and_continues(done):
    output, again = done
    for name in ("prepared", "Base-lora", "Base-merged"):
        shutil.rmtree(artifact(output, name))
    code, printed = again("base_finetune")
    assert code == 0 and "preparing" in printed and "continuing from" in printed, printed
    code, printed = again("train_grpo")
    assert code == 0 and "training skipped" in printed, printed


def test_the_batch_may_be_divided_otherwise_and_choices_written_in_any_case(done):
    _, again = done
    more = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--tp", "ALL", "--merge_base")
    code, printed = again("base_finetune", *more, "Quantised", "--gradient_checkpointing", True)
    assert code == 0 and "training skipped" in printed and "merge skipped" in printed, printed


def test_too_little_room_is_said_before_training_with_figures(done):
    output, again = done
    shutil.rmtree(artifact(output, "Base-lora"))
    shutil.rmtree(artifact(output, "Base-merged"))
    before = contents(output)
    code, printed = again("base_finetune", "--lora_r", 50_000_000, "--overwrite")
    assert code == 2 and "Traceback" not in printed, printed
    assert "training needs at least" in printed and "main memory" in printed and "a lower --lora_r" in printed, printed
    assert "writing needs at least" in printed and "on the disk of" in printed, printed
    assert contents(output) == before


def test_a_training_that_any_callback_ended_is_finished_for_the_next_start(done, monkeypatch):
    output, again = done
    for name in ("Base-lora", "Base-merged", "Base-checkpoints"):
        shutil.rmtree(artifact(output, name))

    class AtStep3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_training_stop or state.global_step == 3

    def killed(run, *args, **more):
        run.lock.release()  # as the end of a process does
        raise SystemExit(9)

    train = StageRun.train
    with monkeypatch.context() as patched:
        patched.setattr(StageRun, "train", lambda run, trainer: (trainer.add_callback(AtStep3()), train(run, trainer)))
        patched.setattr(StageRun, "save", killed)  # before the adapter is written
        code, printed = again("base_finetune", "--max_steps", 8)
    assert code == 9 and "trained 3 steps to step 3" in printed, printed
    code, printed = again("base_finetune", "--max_steps", 8)
    assert code == 0 and "continuing from" in printed and "\ntrained " not in printed, printed
    state = json.loads((artifact(output, "Base-checkpoints") / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    trained = load_file(artifact(output, "Base-checkpoints") / "checkpoint-3" / "adapter_model.safetensors")
    saved = load_file(artifact(output, "Base-lora") / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
