"""The three scripts chained as a user runs them: real saves, merges, skips, and what a user's mistakes get."""

import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from arc.runs import artifacts
from tests.helpers import ROOT, SHARED, run

SMALL = (
    "--engine", "transformers", "--sizes", 3, "--max_seq_length", 320, "--holdout_examples", 8, "--lora_r", 8,
    "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--logging_steps", 2, "--eval_puzzles", 4,
    "--learning_rate", 1e-3, "--save_steps", 4, "--gradient_checkpointing", False,
)  # fmt: skip
SFT = (*SMALL, "--max_steps", 8, "--eval_steps", 4)
GRPO = (*SMALL, "--max_steps", 2, "--eval_steps", 2, "--num_generations", 2, "--logging_steps", 1)
STAGES = (
    ("base_finetune.py", "Base", SFT),
    ("base_finetune_final.py", "Final", SFT),
    ("train_grpo.py", "Final-RL", GRPO),
)


def artifact(output, name):
    return output / f"Llama-3.2-1B-{name}"


def contents(folder):
    """Names, sizes and times of all files below a folder: equal before and after what must not touch them."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def chain(base, dataset, output, extra=(), **how):
    printed = {}
    for script, name, flags in STAGES:
        start = ("--base_model", base) if name == "Base" else ()
        printed[name] = run(script, *flags, *start, "--dataset_dir", dataset, "--output_dir", output, *extra, **how)
    return printed


@pytest.fixture(scope="module")
def chained(tmp_path_factory, demo_base, demo_dataset):
    """Output folder and printed text of the three stages on the demo's data, each started as a user starts it."""
    output = tmp_path_factory.mktemp("chain") / "output"
    return output, chain(demo_base, demo_dataset, output, fresh=True)


def check_chain(output):
    """All seven folders are there and load with plain libraries; merges are the bases of what follows."""
    names = ["prepared", *(f"{stage}-{kind}" for stage in ("Base", "Final", "Final-RL") for kind in ("lora", "merged"))]
    assert all(artifact(output, name).is_dir() for name in names)
    ids = torch.arange(12).reshape(1, -1) % 10
    for stage, parent in (("Base", "prepared"), ("Final", "Base-merged"), ("Final-RL", "Final-merged")):
        lora, merged = artifact(output, f"{stage}-lora"), artifact(output, f"{stage}-merged")
        config = PeftConfig.from_pretrained(lora)
        assert config.base_model_name_or_path == str(artifact(output, parent).resolve())
        base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
        with torch.no_grad():
            start = base(ids).logits
            adapted = PeftModel.from_pretrained(base, lora).eval()(ids).logits
            alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
        assert torch.allclose(adapted, alone, atol=0.05)  # rounding to bfloat16
        # A model that solves nothing gives GRPO no signal: see test_grpo_learns_from_its_rewards for one that does.
        assert stage == "Final-RL" or not torch.equal(adapted, start)
        assert len(AutoTokenizer.from_pretrained(merged)) == len(AutoTokenizer.from_pretrained(lora)) == start.shape[-1]
        assert {p.suffix for p in lora.iterdir()} <= {".json", ".jsonl", ".safetensors", ".png", ".md"}
        assert {p.suffix for p in merged.iterdir()} <= {".json", ".safetensors"}


def test_three_stages_make_seven_folders_that_plain_libraries_load(chained):
    check_chain(chained[0])


def test_the_log_shows_data_masks_and_numbers(chained):
    output, printed = chained
    for stage in ("Base", "Final"):
        text = printed[stage]
        for words in (
            "base puzzles", "held out 8 of the same tasks", "One sample: ", "learned: ", "tokens a sample: mean",
            "an epoch: ", "estimated time", "tokens/s", "tokens_per_s", "eval_exact_match", "trained 8 steps", "saved",
            "versions: python",
        ):  # fmt: skip
            assert words in text, f"{stage}: {words}\n{text}"
    assert "learned: 100.0% of the tokens" in printed["Base"]  # stage 1 learns the whole text
    assert "learned: 100.0% of the tokens" not in printed["Final"]
    records = [json.loads(x) for x in (artifact(output, "Final-lora") / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 4, 6, 8]
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 8]
    assert [r["step"] for r in records if "eval_exact_match" in r] == [4, 8]
    assert all(r["tokens_per_s"] > 0 for r in records if "loss" in r)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0]
    assert (artifact(output, "Final-lora") / "loss.png").read_bytes()[:4] == b"\x89PNG"
    grpo = [json.loads(x) for x in (artifact(output, "Final-RL-lora") / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "rewards/exact_match/mean", "rewards/cell_accuracy/mean"} <= set(grpo[1])
    assert [r["step"] for r in grpo if "eval_exact_match" in r] == [0, 2]  # stage 3 measures its start too


def test_the_manifest_says_how_an_artifact_was_made(chained):
    manifest = json.loads((artifact(chained[0], "Base-lora") / "manifest.json").read_text())
    assert manifest["stage"] == "Base"
    prepared = artifact(chained[0], "prepared")
    assert manifest["made_from"] == {prepared.name: artifacts.fingerprint(prepared)}
    assert manifest["settings"]["lora_r"] == 8
    assert manifest["precision"] == {"engine": "transformers", "dtype": "float32", "load_in_4bit": False}
    assert {"torch", "transformers", "peft", "trl"} <= set(manifest["versions"])
    merged = json.loads((artifact(chained[0], "Base-merged") / "manifest.json").read_text())
    assert (merged["settings"], merged["merge_base"]) == (manifest["settings"], "quantised")
    assert len(manifest["data_fingerprint"]) == 64


def test_the_trained_embedding_is_float32_and_shared(chained):
    state = load_file(artifact(chained[0], "Base-lora") / "adapter_model.safetensors")
    assert {str(t.dtype) for t in state.values()} == {"torch.float32"}
    embedding, head = (next(t for n, t in state.items() if part in n) for part in ("embed_tokens", "lm_head"))
    assert torch.equal(embedding, head)


def test_a_second_run_skips_everything(chained, demo_base, demo_dataset):
    output = chained[0]
    before = contents(output)
    for name, printed in chain(demo_base, demo_dataset, output).items():
        assert "training skipped" in printed, name
        assert "merge skipped" in printed, name
    assert contents(output) == before


def test_with_the_adapter_there_only_the_merge_runs(chained, tmp_path, demo_base, demo_dataset):
    output = tmp_path / "output"
    shutil.copytree(chained[0], output)
    merged = artifact(output, "Base-merged")
    weights = load_file(merged / "model.safetensors")
    shutil.rmtree(merged)
    printed = run(
        "base_finetune.py", *SFT, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", output
    )
    assert "training skipped" in printed
    assert "saved" in printed and "merged onto" in printed
    again = load_file(merged / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    # The output folder was copied: the merge is onto the base beside the adapter, not the one at the old place.
    assert json.loads((merged / "manifest.json").read_text())["base"] == str(artifact(output, "prepared"))


def test_an_interrupted_run_continues_and_ends_in_the_same_weights(chained, tmp_path, demo_base, demo_dataset):
    # A run that stopped after the checkpoint of step 4: what is left of it is the folder of checkpoints.
    output = tmp_path / "output"
    shutil.copytree(artifact(chained[0], "prepared"), artifact(output, "prepared"))
    shutil.copytree(artifact(chained[0], "Base-checkpoints"), artifact(output, "Base-checkpoints"))
    shutil.rmtree(artifact(output, "Base-checkpoints") / "checkpoint-8")
    flags = ("--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", output)
    printed = run("base_finetune.py", *SFT, *flags, "--learning_rate", 5e-4, "--n", 100, expect=2)
    assert "checkpoints of a run with other settings (learning_rate, n, puzzles)" in printed
    printed = run("base_finetune.py", *SFT, *flags)
    assert "continuing from" in printed and "checkpoint-4" in printed
    once, twice = (load_file(artifact(o, "Base-lora") / "adapter_model.safetensors") for o in (chained[0], output))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    logs = [
        [
            (r["step"], r["loss"])
            for r in map(json.loads, (artifact(o, "Base-lora") / "metrics.jsonl").open())
            if "loss" in r
        ]
        for o in (chained[0], output)
    ]
    assert logs[0] == logs[1]  # the steps before the checkpoint are kept, those after it are written once


def test_training_that_was_done_but_not_saved_takes_no_further_step(tmp_path, demo_base, demo_dataset):
    # A constant rate: with a cosine, a step too many would go unseen, because its rate is 0.
    flags = ("--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", tmp_path, "--eval_steps", 3)
    flags = (*SFT, *flags, "--max_steps", 4, "--logging_steps", 3, "--lr_scheduler_type", "constant_with_warmup")
    printed = run("base_finetune.py", *flags, "--report_to", "tensorboard", "--gradient_checkpointing", True)
    assert "trained 4 steps to step 4" in printed
    lora = artifact(tmp_path, "Base-lora")
    once = load_file(lora / "adapter_model.safetensors")
    records = [json.loads(x) for x in (lora / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 3, 4]  # the last steps are logged too
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 4]
    events = EventAccumulator(str(next(tmp_path.rglob("*tfevents*"))))
    events.Reload()
    assert {"train/loss", "train/tokens_per_s", "eval/loss", "eval/exact_match"} <= set(events.Tags()["scalars"])
    shutil.rmtree(lora)
    shutil.rmtree(artifact(tmp_path, "Base-merged"))
    printed = run("base_finetune.py", *flags)
    assert "continuing from" in printed and "steps to step" not in printed.split("continuing from")[1]
    again = load_file(lora / "adapter_model.safetensors")
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_dry_run_writes_nothing(tmp_path, demo_base, demo_dataset):
    output = tmp_path / "output"
    printed = run(
        "base_finetune.py", *SFT, "--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", output,
        "--dry_run",
    )  # fmt: skip
    assert "dry run: settings, data, model folder and masks are fine" in printed
    assert "One sample: " in printed
    assert re.search(r"to train: [\d.]+ epochs, 8 steps, [\d,]+ tokens\n", printed) and "estimated time" not in printed
    assert not output.exists()


@pytest.mark.parametrize(
    "extra",
    [("--load_in_4bit", "true"), ("--full_vocab", "true"), ("--target_modules", "q_proj", "embed_tokens", "lm_head")],
    ids=["4bit", "full_vocab", "embeddings_everywhere"],
)
def test_other_ways_through_all_stages(tmp_path, demo_base, demo_dataset, extra):
    extra = (*extra, "--max_steps", 2, "--eval_steps", 0)
    chain(demo_base, demo_dataset, tmp_path / "output", extra)
    merged = artifact(tmp_path / "output", "Final-RL-merged")
    manifest = json.loads((merged / "manifest.json").read_text())
    assert manifest["merged_onto"] == ("quantised" if "--load_in_4bit" in extra else "16-bit")
    full = len(AutoTokenizer.from_pretrained(demo_base))
    assert (len(AutoTokenizer.from_pretrained(merged)) == full) is ("--full_vocab" in extra)


@pytest.fixture(scope="module")
def coins(tmp_path_factory, demo_base):
    """A dataset whose outputs are one cell, 1 or 2 at random, and a stage-1 merge trained on it.

    The model soon answers with one of them and is right half of the time, so that groups differ in reward: stage 3 has
    signal from its first step.
    """
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("coins")
    dataset, output = folder / "dataset", folder / "output"
    dataset.mkdir()
    for task in range(2):
        pairs = [{"input": [[int(rng.integers(3, 9))]], "output": [[int(rng.integers(1, 3))]]} for _ in range(200)]
        (dataset / f"coin{task}.json").write_text(json.dumps(pairs))
    fixed = ("--perm", False, "--dataset_dir", dataset, "--holdout_examples", 4)
    fast = ("--learning_rate", 5e-3, "--embedding_learning_rate", 5e-3, "--max_steps", 80, "--eval_steps", 0)
    where = ("--save_steps", 0, "--base_model", demo_base, "--output_dir", output)
    run("base_finetune.py", *SFT, *fixed, *fast, *where)
    return fixed, artifact(output, "Base-merged")


@pytest.mark.parametrize("fast_rollouts", [False, True])
def test_grpo_learns_from_its_rewards(tmp_path, coins, fast_rollouts):
    fixed, merged = coins
    output = tmp_path / "output"
    steps = ("--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3, "--num_generations", 8)
    batch = ("--per_device_train_batch_size", 16, "--fast_rollouts", fast_rollouts)
    flags = (*GRPO, *fixed, *steps, *batch, "--output_dir", output, "--base_model", merged)
    run("train_grpo.py", *flags)
    records = [json.loads(x) for x in (artifact(output, "Final-RL-lora") / "metrics.jsonl").read_text().splitlines()]
    rewards = [r["reward"] for r in records if "reward" in r]
    assert len(rewards) == 4 and 0 < np.mean(rewards) < 1
    assert any(r["grad_norm"] > 0 for r in records if "grad_norm" in r)
    state = load_file(artifact(output, "Final-RL-lora") / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for name, t in state.items() if "lora_B" in name)
    assert not any("embed_tokens" in name for name in state)  # stage 3 leaves the embeddings alone

    # Stopped after step 2 and continued: the same rewards, and the same weights bit for bit.
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name in ("Final-RL-lora", "Final-RL-merged", "Final-RL-checkpoints/checkpoint-4"):
        shutil.rmtree(artifact(output, name))
    printed = run("train_grpo.py", *flags)
    assert "checkpoint-2" in printed and "trained 2 steps to step 4" in printed
    again = load_file(artifact(output, "Final-RL-lora") / "adapter_model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)
    records = [json.loads(x) for x in (artifact(output, "Final-RL-lora") / "metrics.jsonl").read_text().splitlines()]
    assert [r["reward"] for r in records if "reward" in r] == rewards


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real tokenizer and the course dataset beside the checkout")
def test_three_stages_with_the_real_tokenizer_and_course_puzzles(tmp_path):
    base, output = tmp_path / "base", tmp_path / "output"
    run(SHARED / "llama32_1b" / "make_standin.py", base, "--layers", 2, "--hidden", 64)
    extra = ("--max_seq_length", 1024, "--max_steps", 2, "--n", 200, "--eval_puzzles", 2)
    printed = chain(base, SHARED / "data" / "course_dataset", output, extra)
    check_chain(output)
    assert len(AutoTokenizer.from_pretrained(artifact(output, "Final-RL-merged"))) == 79
    assert "200 to train on" in printed["Base"]
    # One adapter whose merge is missing: only that merge runs, all else is skipped.
    shutil.rmtree(artifact(output, "Base-merged"))
    again = chain(base, SHARED / "data" / "course_dataset", output, extra)
    assert all("training skipped" in text for text in again.values())
    assert ["merge skipped" in again[stage] for stage in ("Base", "Final", "Final-RL")] == [False, True, True]
    check_chain(output)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("base_finetune.py", {"--dataset_dir": "nothing"}, "nothing: no such folder.*make_dataset.py --out nothing"),
        ("base_finetune.py", {"--base_model": "nothing"}, "cannot load the model nothing: .*--base_model FOLDER"),
        ("base_finetune.py", {"--learning_rate": "-1"}, "--learning_rate is -1.0: expected a number above 0"),
        ("base_finetune.py", {"--n": 100000}, "100,?000"),
        ("base_finetune.py", {"--max_seq_length": 16}, "no puzzle fits --max_seq_length 16"),
        ("base_finetune.py", {"--holdout_tasks": 1000}, "1,?000"),
        ("base_finetune.py", {"--engine": "unsloth"}, "--engine unsloth cannot run here"),
        ("base_finetune_final.py", {"--base_model": None}, "python base_finetune.py --output_dir .* first"),
        ("train_grpo.py", {"--base_model": None}, "python base_finetune_final.py --output_dir .* first"),
        (
            "train_grpo.py",
            {"--num_generations": 3},
            "--num_generations is 3: expected 2 or more that divide",
        ),
        ("train_grpo.py", {"--temperature": 0, "--reward_cells": 5}, "--temperature is 0.0.*--reward_cells is 5.0"),
        ("base_finetune.py", {"--lr_scheduler_type": "foo"}, "foo"),
        ("base_finetune.py", {"--optim": "foo"}, "foo"),
        ("base_finetune.py", {"--report_to": "wandb"}, "--report_to wandb: .*wandb"),
        ("base_finetune.py", {"--output_dir": __file__}, "Not a directory|is there without|exists|directory"),
        ("base_finetune.py", {"--n": "x"}, "invalid int value: 'x'"),
    ],
)
def test_a_users_mistake_gets_one_clear_error(tmp_path, demo_base, demo_dataset, script, flags, message):
    import re

    if torch.cuda.is_available() and "--engine" in flags:
        pytest.skip("this machine has CUDA")
    given = {"--base_model": demo_base, "--dataset_dir": demo_dataset, "--output_dir": tmp_path / "output", **flags}
    arguments = [x for name, value in given.items() if value is not None for x in (name, value)]
    printed = run(script, *(GRPO if script == "train_grpo.py" else SFT), *arguments, expect=2)
    assert "Traceback" not in printed
    errors = printed[printed.index("error: ") :]
    assert re.search(message, errors, re.DOTALL), errors
    assert errors.count("error: ") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("script", ["base_finetune.py", "base_finetune_final.py", "train_grpo.py"])
def test_help_is_quick_and_complete(script):
    def cpu_seconds():  # of all that was run so far: not the wait for other workers
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    printed = run(script, "--help", fresh=True)
    needed = cpu_seconds() - before
    subprocess.run([sys.executable, "-c", "from transformers.hf_argparser import HfArgumentParser"], check=True)
    parser_alone = cpu_seconds() - before - needed
    for flag in ("--base_model", "--dataset_dir", "--output_dir", "--engine", "--n", "--max_steps", "--learning_rate",
                 "--lora_r", "--max_seq_length", "--seed", "--eval_steps", "--save_steps", "--report_to",
                 "--dry_run"):  # fmt: skip
        assert flag in printed
    assert needed < 1.6 * parser_alone  # torch, trl and peft would be several times as much


def test_scripts_are_thin():
    for script, _, _ in STAGES:
        assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 100


def test_puzzles_without_solutions_are_never_asked_for(demo_base, demo_dataset, tmp_path):
    """They are trained on by their demonstrations; measured and rewarded are only the others."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number, path in enumerate(sorted(demo_dataset.glob("*.json"))):
        pairs = json.loads(path.read_text())
        test = pairs[3] if number % 2 else {"input": pairs[3]["input"]}
        (folder / path.name).write_text(json.dumps({"train": pairs[:3], "test": [test]}))
    where = ("--dataset_dir", folder, "--output_dir", tmp_path / "output", "--max_steps", 2, "--eval_steps", 2)
    printed = run("base_finetune.py", *SMALL, *where, "--base_model", demo_base)
    assert "of 8 held out: no outputs of their tests" in printed and "eval_exact_match" in printed
    grpo = (*GRPO, *where, "--base_model", artifact(tmp_path / "output", "Base-merged"))
    assert "of 9 to train on: no outputs of their tests" in run("train_grpo.py", *grpo)
    for path in folder.iterdir():
        task = json.loads(path.read_text())
        path.write_text(json.dumps({"train": task["train"], "test": [{"input": task["test"][0]["input"]}]}))
    printed = run("train_grpo.py", *grpo, "--artifact_prefix", "none", expect=2)
    assert "no puzzle to train on has the outputs of its tests" in printed
