"""The run that shows whether the pipeline learns, on models and puzzles of no size: its chain, figures and split."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import yaml

from tests.helpers import ROOT, SHARED
from tests.script_processes import Script

sys.path.insert(0, str(ROOT / "benchmarks"))

import base_finetune_final
import learn
from arc.evaluation.scores import wilson_interval
from arc.puzzles import splits
from arc.runs.settings import parse_settings
from demo import make_base, make_dataset

TASKS = {"coin": (1, 2), "more": (3, 4), "last": (5, 5)}
SPLIT = {"sizes": [2], "holdout_examples": 8, "holdout_tasks": 1}
TRAINING = {
    **SPLIT, "engine": "transformers", "load_in_4bit": False, "perm": False, "tp": "false", "rt": "false", "lora_r": 8,
    "max_seq_length": 200, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_steps": 0,
    "gradient_checkpointing": False, "max_steps": 120, "logging_steps": 5, "save_steps": 0,
    "learning_rate": 5e-3, "embedding_learning_rate": 5e-3,
}  # fmt: skip
CONFIGS = {
    "base": {"size": "tiny", "pretrain_steps": 2, "pretrain_batch": 512, "pretrain_compile": False},
    "programs": {"programs": 2, "examples": 3, "max_side": 3, "workers": 1},
    "stage1": TRAINING | {"max_steps": 150, "save_steps": 150},
    "stage2": TRAINING | {"max_steps": 20},
    "ablation": TRAINING | {"max_steps": 2},
    "stage3": TRAINING | {
        "max_steps": 2, "learning_rate": 1e-2, "num_generations": 4, "scan_samples": 2, "eval_steps": 2,
        "eval_puzzles": 3, "logging_steps": 1, "fast_rollouts": True,
    },
    "evaluate_greedy": SPLIT | {"views": 1, "decoding": "greedy", "max_new_tokens": 8},
    "evaluate_search": SPLIT | {"views": 2, "puzzles": 5, "max_new_tokens": 8},
}  # fmt: skip


def write_configs(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | changed.get(name, {})), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A dataset whose outputs are one cell of two colours at most, and settings for it."""
    folder = tmp_path_factory.mktemp("learn")
    (folder / "dataset").mkdir()
    for number, (name, colours) in enumerate(TASKS.items()):
        pairs = [{"input": [[9 - number]], "output": [[colours[i % 7 % 2]]]} for i in range(90)]
        (folder / "dataset" / f"{name}.json").write_text(json.dumps(pairs), encoding="utf-8")
    write_configs(folder / "configs")
    return folder


def flags_of(inputs, *more):
    where = {"dataset_dir": "dataset", "output_dir": "output", "configs": "configs", "results": "learn.json"}
    return [*(part for flag, name in where.items() for part in (f"--{flag}", str(inputs / name))), *more]


def chain_of(inputs, *more):
    return learn.Chain(learn.parse_flags(flags_of(inputs, *more)))


def start_quickly(job, log, environment=None):
    """Start a job's script, as learn.start does with one GPU."""
    assert environment is None
    return Script(*job.command, log=log)


def start(inputs, *more):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "learn.py"), *flags_of(inputs, *more)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def learned(inputs):
    """The main run: told to stop in the middle of stage 1, then started again; what both have printed.

    The first start is a user's; what the others start need not import the libraries again.
    """
    process = start(inputs)
    metrics = inputs / "output" / f"{learn.PREFIX}-Base-checkpoints" / "metrics.jsonl"
    while process.poll() is None and not metrics.is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = [process.communicate()[0]]
    codes = [process.returncode]
    for pieces in (["--pieces", *learn.PIECES[:5]], ["--pieces", "search", "--sets", "seen"]):
        output = io.StringIO()
        # In this process: what it starts are processes of their own.
        with contextlib.redirect_stdout(output), mock.patch.object(learn, "start", start_quickly):
            codes.append(learn.main(flags_of(inputs, *pieces)))
        printed.append(output.getvalue())
    assert codes == [143, 0, 0], "\n".join(printed)[-6000:]
    return inputs, printed


def results(inputs, name):
    return json.loads((inputs / "output" / "evaluation" / name / "results.json").read_text(encoding="utf-8"))


def test_a_run_that_was_stopped_goes_on_and_ends(learned):
    inputs, printed = learned
    log = (inputs / "output" / "logs" / "stage1.log").read_text(encoding="utf-8")
    assert "continuing from" in log and "steps to step 150" in log
    assert "base: done after" in printed[0] and "base: done already" in printed[1]
    record = json.loads((inputs / "learn.json").read_text(encoding="utf-8"))
    stages = {row["name"]: row for row in record["stages"]}
    assert list(stages) == ["base", "stage1", "stage2", "stage3"]
    assert [row["starts"] for row in stages.values()] == [1, 2, 1, 1]
    assert [stages[name]["steps"] for name in learn.STAGES] == [150, 20, 2]
    for row in stages.values():
        assert row["tokens"] > 0 and 0 < row["training_seconds"] < row["seconds"]
    assert stages["stage3"]["scan"]["samples"] == 2 and stages["stage3"]["policy"]["heldout_puzzles"] == 3
    assert record["versions"]["torch"] and record["machine"] and record["settings"]["stage1"]["max_steps"] == 150
    assert record["commands"]["stage2"].startswith("python base_finetune_final.py --config ")
    assert (inputs / "learn.png").read_bytes()[:4] == b"\x89PNG"


def test_every_figure_is_one_of_the_evaluations(learned):
    inputs, _ = learned
    record = json.loads((inputs / "learn.json").read_text(encoding="utf-8"))
    assert [(row["set"], row["model"]) for row in record["rows"]] == [(s, m) for s in learn.SETS for m in learn.MODELS]
    solved = 0
    for row in record["rows"]:
        greedy, search = results(inputs, f"greedy-{row['set']}"), results(inputs, "search-seen")
        right = [entry[row["model"]]["correct"][:1] == [True] for entry in greedy["puzzles"].values()]
        assert row["n"] == len(right) and row["exact_1"] == sum(right) / len(right)
        assert row["ci_1"] == pytest.approx(wilson_interval(sum(right), len(right)))
        assert greedy["settings"]["decoding"] == "greedy" and greedy["settings"]["views"] == 1
        solved += sum(right)
        new = [right[i] for i, entry in enumerate(greedy["puzzles"].values()) if not entry["seen_test"]]
        assert row["tasks_solved"] == len(
            {learn.by_task(k) for k, good in zip(greedy["puzzles"], right, strict=True) if good}
        )
        assert row["n_new"] == len(new) and row["exact_1_new"] == (sum(new) / len(new) if new else None)
        if row["set"] == "unseen":  # not measured yet
            assert row["exact_2"] is None and row["ci_2"] is None
            continue
        [found] = [one for one in search["table"] if one["model"] == row["model"]]
        assert (row["exact_2"], row["ci_2"], row["n_2"]) == (found["exact_2"], found["exact_2_interval"], 5)
        assert search["settings"]["decoding"] == "search"
        assert set(greedy["puzzles"]) >= set(search["puzzles"])
    assert solved > 0, "a coin is guessed now and then"
    # Neither set has a puzzle that was trained on, and the sets share none.
    names = [{entry["puzzle"] for entry in results(inputs, f"greedy-{s}")["puzzles"].values()} for s in learn.SETS]
    assert not names[0] & names[1] and {learn.task_of(name) for name in names[1]} == set(
        record["split"]["unseen_tasks"]
    )


def test_the_gain_leaves_out_the_puzzles_that_chose_the_adapter(learned):
    inputs, _ = learned
    gain = json.loads((inputs / "learn.json").read_text(encoding="utf-8"))["grpo_gain"]
    known = learn.guards_puzzles(chain_of(inputs))
    puzzles = results(inputs, "greedy-seen")["puzzles"]
    assert len(known) == 3 and known < set(puzzles)
    changes = [
        int(entry["stage3"]["correct"][:1] == [True]) - int(entry["stage2"]["correct"][:1] == [True])
        for key, entry in puzzles.items()
        if key not in known
    ]
    assert (gain["seen"]["n"], gain["seen"]["left_out"]) == (len(changes), 3) == (5, 3)
    assert gain["points"] == gain["seen"]["points"] == pytest.approx(100 * sum(changes) / 5)
    assert gain["ci"][0] <= gain["points"] <= gain["ci"][1] and gain["unseen"]["left_out"] == 0


def test_what_is_done_is_not_done_again_unless_its_settings_change(learned, capsys, monkeypatch):
    inputs, _ = learned
    monkeypatch.setattr(learn, "start", start_quickly)
    before = json.loads((inputs / "learn.json").read_text(encoding="utf-8"))
    assert learn.main(flags_of(inputs, "--sets", "seen")) == 0
    printed = capsys.readouterr().out
    assert printed.count("done already") == 7 and "done after" not in printed
    assert json.loads((inputs / "learn.json").read_text(encoding="utf-8")) == before
    path = inputs / "configs" / "stage2.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("max_steps: 20", "max_steps: 21"), encoding="utf-8")
    jobs = (inputs / "output" / "jobs.json").read_text(encoding="utf-8")
    try:
        assert learn.main(flags_of(inputs)) == 2  # the stage's own word: it was trained with other settings
        printed = capsys.readouterr().out
        assert "trained with other settings: max_steps" in printed and "stage1: done already" in printed
        now = json.loads((inputs / "learn.json").read_text(encoding="utf-8"))
        assert [now[part] for part in ("rows", "stages")] == [before[part] for part in ("rows", "stages")]
        assert (inputs / "output" / "jobs.json").read_text(encoding="utf-8") == jobs
    finally:
        path.write_text(text, encoding="utf-8")


def test_a_job_is_stopped_when_its_time_is_over_and_continued(tmp_path, monkeypatch):
    script, saved, result = tmp_path / "slow.py", tmp_path / "saved", tmp_path / "result"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"saved, result = pathlib.Path({str(saved)!r}), pathlib.Path({str(result)!r})\n"
        "def stop(*_):\n"
        "    saved.touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('from the start' if not saved.exists() else 'continuing', flush=True)\n"
        "time.sleep(0 if saved.exists() else 600)\n"
        "result.touch()\n"
    )
    (tmp_path / "settings").write_text("1")
    job = learn.Job("slow", [str(script)], [tmp_path / "settings"], result)
    chain = learn.Chain(learn.parse_flags(["--dataset_dir", "any", "--output_dir", str(tmp_path / "output")]))
    assert learn.run_job(job, chain, time.monotonic() + learn.LEAST - 1) == learn.NOT_DONE and not saved.exists()
    assert chain.state == {}  # not even begun
    monkeypatch.setattr(learn, "LEAST", 1.0)
    assert learn.run_job(job, chain, time.monotonic() + 3) == learn.NOT_DONE and saved.exists()
    assert not chain.is_done(job)
    again = learn.Chain(chain.args)
    assert learn.run_job(job, again, float("inf")) == 0 and again.is_done(job)
    assert len(again.state["slow"]["seconds"]) == 2 and again.state["slow"]["seconds"][0] >= 2
    assert learn.Chain(chain.args).is_done(job)
    (tmp_path / "settings").write_text("2")
    assert not again.is_done(job)
    whole = learn.Job("whole", [str(script)], [], result, whole=100)  # goes on from nowhere: it is not begun in vain
    assert learn.run_job(whole, again, time.monotonic() + 99) == learn.NOT_DONE and "whole" not in again.state


def test_jobs_that_need_nothing_of_each_other_run_together(tmp_path):
    # Each waits for the other: one after the other they would not end.
    names = ("one", "two")
    script = tmp_path / "wait.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:])\n"
        "own.touch()\n"
        "end = time.monotonic() + 60\n"
        "while not other.exists() and time.monotonic() < end:\n"
        "    time.sleep(0.05)\n"
        "sys.exit(not other.exists())\n"
    )
    paths = {name: tmp_path / name for name in names}
    jobs = [
        learn.Job(name, [str(script), str(paths[name]), str(paths[other])], [], paths[name])
        for name, other in zip(names, reversed(names), strict=True)
    ]
    flags = ["--dataset_dir", "any", "--output_dir", str(tmp_path / "output"), "--together", "2"]
    chain = learn.Chain(learn.parse_flags(flags))
    assert learn.run_jobs(jobs, chain, float("inf")) == 0
    assert all(chain.is_done(job) for job in jobs) and not chain.running
    assert set(learn.Chain(chain.args).state) == set(names)
    failing = learn.Job("three", [str(tmp_path / "nothing.py")], [], tmp_path / "three")
    assert learn.run_jobs([failing, *jobs], chain, float("inf")) == 2
    assert learn.run_jobs([failing], chain, time.monotonic()) == learn.NOT_DONE


def test_jobs_at_a_time_are_spread_over_the_gpus(tmp_path, monkeypatch, capsys):
    # Each writes which GPU it sees, once all have begun.
    script, count = tmp_path / "gpu.py", 5
    script.write_text(
        "import os, pathlib, sys, time\n"
        "own = pathlib.Path(sys.argv[1])\n"
        "own.with_suffix('.begun').touch()\n"
        "end = time.monotonic() + 60\n"
        f"while len(list(own.parent.glob('*.begun'))) < {count} and time.monotonic() < end:\n"
        "    time.sleep(0.05)\n"
        "own.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    jobs = [
        learn.Job(f"job{i}", [str(script), str(tmp_path / f"job{i}")], [], tmp_path / f"job{i}", alone=i == 3)
        for i in range(count)
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,2")
    flags = ["--dataset_dir", "any", "--output_dir", str(tmp_path / "output"), "--together", "5", "--gpus", "3"]
    chain = learn.Chain(learn.parse_flags(flags))
    assert learn.run_jobs(jobs, chain, float("inf")) == 0
    seen = [job.result.read_text() for job in jobs]
    alone, others = seen[3], [*seen[:3], *seen[4:]]
    assert sorted([alone, *others]) in (["2", "2", "5", "7", "7"], ["2", "2", "5", "5", "7"], ["2", "5", "5", "7", "7"])
    assert alone not in others and chain.on_gpu == [0, 0, 0] and not chain.placed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with pytest.raises(SystemExit):
        learn.parse_flags(flags)
    assert "--gpus is 3, and CUDA_VISIBLE_DEVICES names 2" in capsys.readouterr().err


def put(*paths):
    """Write files that only have to be there."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")


def test_the_later_stages_train_on_extra_puzzles_besides(inputs, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--configs", str(write_configs(tmp_path / "configs"))]
    changed = tmp_path / "configs" / "changed.yaml"
    changed.write_text(yaml.safe_dump(SPLIT | {"share": 0.5}), encoding="utf-8")
    chain = chain_of(inputs, *flags)
    assert [job.name for job in next(chain.jobs(["base"]))] == ["base", "programs", "changed"]
    models = [tmp_path / folder / "manifest.json" for folder in learn.MODELS.values()]
    put(tmp_path / "base" / "make_base.json", *models)
    for name in ("programs", "changed"):
        with pytest.raises(FileNotFoundError, match=f"stage2 needs .*{name}, which is not there: run the pieces"):
            chain.stage("stage2")
        put(tmp_path / name / "rules.txt")
    folders = [str(tmp_path / name) for name in ("programs", "changed")]
    assert chain.stage("stage2").command[-3:] == ["--extra_dataset_dirs", *folders]
    for name in ("programs", "changed"):
        before = chain.stage("stage2").identity()
        (tmp_path / name / "rules.txt").write_text("others", encoding="utf-8")
        assert chain.stage("stage2").identity() != before, "with other puzzles it is not done"
    assert "--extra_dataset_dirs" not in chain.stage("stage1").command
    for job in (
        chain.stage("stage3"),
        *chain.seeds(),
    ):  # which trains on them besides, and with its other seeds
        assert job.command[-3:] == ["--extra_dataset_dirs", *folders]
        assert tmp_path / "programs" / "rules.txt" in job.inputs
    changed.unlink()
    assert chain.stage("stage2").command[-2:] == ["--extra_dataset_dirs", folders[0]]
    (tmp_path / "configs" / "programs.yaml").unlink()
    assert chain.extras() == []
    assert not any("--extra_dataset_dirs" in chain.stage(name).command for name in ("stage2", "stage3"))


def test_the_job_makes_changed_outputs_of_what_stage_2_trains_on(tmp_path):
    """With the settings of make learn, on a small dataset: the command is taken, and stage 2 takes what it writes."""
    dataset, output = tmp_path / "dataset", tmp_path / "output"
    make_dataset.main(["--out", str(dataset), "--tasks_per_family", "3", "--examples", "140"])
    chain = learn.Chain(learn.parse_flags(["--dataset_dir", str(dataset), "--output_dir", str(output)]))
    jobs = {job.name: job for job in chain.extras()}
    few = ["--workers", "1", "--share", "0.1", "--holdout_examples", "40", "--holdout_tasks", "5"]
    assert make_dataset.main([*jobs["changed"].command[1:], *few]) == 0
    assert jobs["changed"].result.is_file()
    put(output / learn.MODELS["stage1"] / "manifest.json", jobs["programs"].result)
    command = chain.stage("stage2").command
    settings = parse_settings(base_finetune_final.Settings, [*command[1:], *few[4:]])
    settings.extra_dataset_dirs.remove(str(output / "programs"))  # which is not made here
    plain = splits.load_split(dataclasses.replace(settings, extra_dataset_dirs=[]), quiet=True)
    split = splits.load_split(settings, quiet=True)
    made = len(list((output / "changed").glob("*.json")))
    more = len(split.train.keys) - len(plain.train.keys)
    assert made > 50 and 0.95 * made < more <= made, "next to nothing gives a held-out answer away"


def test_ablations_run_beside_stage_2_where_there_are_gpus_for_both(inputs, tmp_path):
    put(tmp_path / learn.MODELS["stage1"] / "manifest.json", tmp_path / "programs" / "rules.txt")
    flags = ["--output_dir", str(tmp_path), "--together", "6", "--gpus", "2"]
    stage_2, *beside = next(chain_of(inputs, *flags).jobs(["stage2", "ablations"]))
    assert stage_2.name == "stage2" and stage_2.alone
    assert [job.name for job in beside] == [f"ablation-{name}" for name in learn.ABLATIONS if name != "4bit-original"]
    assert not any(job.alone for job in beside)
    [alone] = next(chain_of(inputs, *flags[:-2]).jobs(["stage2", "ablations"]))
    assert alone.name == "stage2"


# ---------------------------------------------------------------------------------------------------------------------
# The split


def test_scripts_that_hold_out_other_puzzles_are_refused(inputs, tmp_path, capsys):
    write_configs(tmp_path / "configs", evaluate_search={"holdout_seed": 7})
    flags = ["--configs", str(tmp_path / "configs"), "--output_dir", str(tmp_path / "output")]
    assert learn.main(flags_of(inputs, *flags)) == 2
    assert "evaluate_search.yaml: not the sizes" in capsys.readouterr().err
    configs = write_configs(tmp_path / "configs")
    (configs / "changed.yaml").write_text(yaml.safe_dump(SPLIT | {"holdout_tasks": 2}), encoding="utf-8")
    assert learn.main(flags_of(inputs, *flags)) == 2, "outputs of held-out tasks would be changed and trained on"
    assert "changed.yaml: not the sizes" in capsys.readouterr().err
    assert not (tmp_path / "output" / "base").exists()


def test_the_split_is_written_down_and_kept_to(inputs, tmp_path, capsys):
    configs = write_configs(tmp_path / "configs")
    flags = ["--configs", str(configs), "--output_dir", str(tmp_path / "output")]
    split = learn.check_split(chain_of(inputs, *flags))
    assert split["unseen_tasks"] == [name for name in TASKS if name in split["unseen_tasks"]]
    assert (split["tasks"], len(split["unseen_tasks"]), split["seen"]) == (3, 1, 8)
    assert split["train"] + split["seen"] + split["unseen"] == 90
    assert json.loads((tmp_path / "output" / "split.json").read_text(encoding="utf-8")) == split
    assert learn.check_split(chain_of(inputs, *flags)) == split
    # Written beside the settings, as that of the course's data is: other settings for the same data are refused.
    learn.write_json(configs / "split.json", split | {"unseen_tasks": ["another"]})
    assert learn.main(flags_of(inputs, *flags)) == 2
    assert "another split was written down (unseen_tasks differ)" in capsys.readouterr().err


def test_the_settings_of_make_learn_are_taken_and_agree():
    configs = ROOT / "learn"
    chain = learn.Chain(learn.parse_flags(["--dataset_dir", "dataset", "--output_dir", "output"]))
    parsed = make_base.parse_flags(chain.base().command[1:])
    assert parsed.size == "small" and parsed.pretrain_seconds > 0 and parsed.pretrain_compile
    assert chain.base().whole > parsed.pretrain_seconds
    split = json.loads((configs / "split.json").read_text(encoding="utf-8"))
    for name, script in (("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3"), ("ablation", "stage1")):
        settings = learn.settings_of(script, configs / f"{name}.yaml", "dataset")
        assert {part: getattr(settings, part) for part in learn.SPLIT} == {part: split[part] for part in learn.SPLIT}
        assert settings.engine == "transformers" and not settings.load_in_4bit
    changed = learn.read_yaml(configs / "changed.yaml")
    assert changed.items() >= {part: split[part] for part in learn.SPLIT if part.startswith("holdout")}.items()
    for name in ("greedy", "search"):
        settings = learn.settings_of("evaluate", configs / f"evaluate_{name}.yaml", "dataset")
        assert {part: getattr(settings, part) for part in learn.SPLIT} == {part: split[part] for part in learn.SPLIT}
        assert (settings.decoding, settings.views) == (("greedy", 1) if name == "greedy" else ("search", 16))
    assert len(split["unseen_tasks"]) == split["holdout_tasks"] == 40


def test_the_split_written_down_is_that_of_the_course_data(tmp_path):
    data = SHARED / "data" / "course_dataset"
    if not data.is_dir():
        pytest.skip("no course dataset beside this checkout")
    args = learn.parse_flags(["--dataset_dir", str(data), "--output_dir", str(tmp_path)])
    split = learn.check_split(learn.Chain(args))
    assert split == json.loads((ROOT / "learn" / "split.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "split.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Figures, by hand


def test_the_paired_gain_by_hand():
    before = {"a-000_0": False, "a-001_0": False}
    # Of two puzzles one is gained: resampled, the mean is 0, 0.5, 0.5 or 1 with equal chances.
    half = learn.paired_gain(before, [{"a-000_0": True, "a-001_0": False}], learn.by_puzzle)
    assert half == {"points": 50.0, "ci": [0.0, 100.0], "n": 2}
    # All of one task: nothing varies, and of one trial Wilson's bound is z^2 / (1 + z^2) = 3.8415 / 4.8415.
    whole = learn.paired_gain(before, [{"a-000_0": True, "a-001_0": False}], learn.by_task)
    assert whole == {"points": 50.0, "ci": [pytest.approx(50 - 79.345, abs=0.01), 100.0], "n": 2}
    # Two seeds, one of which gains both: each puzzle gains half, without spread: 3.8415 / (2 + 3.8415).
    seeds = [dict.fromkeys(before, True), dict.fromkeys(before, False)]
    both = learn.paired_gain(before, seeds, learn.by_puzzle)
    assert both["points"] == 50 and both["ci"] == [pytest.approx(50 - 65.763, abs=0.01), 100.0]
    assert learn.paired_gain({}, [{}], learn.by_puzzle) == {"points": None, "ci": None, "n": 0}


def test_the_paired_gain_of_many_puzzles_is_near_the_normal_approximation():
    # 10 of 100 gained, 4 lost: mean 6 points, standard error sqrt((0.14 - 0.06^2) / 100) = 3.693 points.
    before = {f"t{i}-000_0": 10 <= i < 40 for i in range(100)}
    after = {key: (i < 10 or 14 <= i < 40) for i, key in enumerate(before)}
    gain = learn.paired_gain(before, [after], learn.by_puzzle)
    assert gain["points"] == 6.0 and gain["ci"] == pytest.approx([6 - 7.24, 6 + 7.24], abs=1.0)
    # The same change seen by three seeds is no surer; the same lost by one of them is less.
    assert learn.paired_gain(before, [after] * 3, learn.by_puzzle)["ci"] == pytest.approx(gain["ci"], abs=0.01)
    assert learn.paired_gain(before, [after, before, before], learn.by_puzzle)["points"] == 2.0
    # A test input that a seed was not asked is left out.
    assert learn.paired_gain(before, [after, {"t0-000_0": True}], learn.by_puzzle)["n"] == 1


def test_names_of_puzzles_and_tasks():
    assert learn.by_puzzle("007bbfb7-012_1") == "007bbfb7-012" and learn.by_task("007bbfb7-012_1") == "007bbfb7"
    assert learn.by_task("keep-colour-1-000_0") == "keep-colour-1" and learn.by_task("007bbfb7_0") == "007bbfb7"


def test_seconds_and_tokens_from_the_log_leave_measurements_out(tmp_path):
    lines = [
        {"step": 1, "loss": 4.0, "num_input_tokens_seen": 100, "tokens_per_s": 50},
        {"step": 5, "loss": 2.0, "num_input_tokens_seen": 500, "tokens_per_s": 200},
        {"step": 5, "eval_loss": 2.5, "eval_runtime": 99.0},
        {"step": 6, "loss": 1.5, "num_input_tokens_seen": 600, "tokens_per_s": 100},
        {"step": 6, "train_runtime": 200.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = learn.training_figures(tmp_path)
    assert found == {"steps": 6, "tokens": 600, "training_seconds": 2 + 2 + 1, "last_loss": 1.5, "heldout_loss": 2.5}
    assert learn.training_figures(tmp_path / "none") == {}


def test_ablations_change_what_they_say(inputs, tmp_path):
    chain = chain_of(inputs, "--output_dir", str(tmp_path))
    merged = tmp_path / learn.MODELS["stage1"]
    merged.mkdir()
    (merged / "manifest.json").write_text("{}")
    together, after, evaluations = filter(None, chain.jobs(["ablations"]))
    assert {job.name.split("-")[0] for job in evaluations} == {"ablations"}
    jobs = {job.name.removeprefix("ablation-"): job for job in [*together, *after]}
    assert list(jobs) == list(learn.ABLATIONS) and [job.name for job in after] == ["ablation-4bit-original"]
    for name, job in jobs.items():
        script, *argv = job.command
        module = importlib.import_module(os.path.basename(script)[:-3])
        assert module.__name__ == ("base_finetune" if name == "all-tokens" else "base_finetune_final")
        parsed = parse_settings(module.Settings, argv)
        assert parsed.base_model == str(merged) and parsed.max_steps == 2
        assert parsed.output_dir == str(tmp_path / "ablations" / name)
        changed = {
            "embedding-1e-5": parsed.embedding_learning_rate == 1e-5, "r-64": parsed.lora_r == 64,
            "4bit-quantised": parsed.load_in_4bit and parsed.merge_base == "quantised",
            "4bit-original": parsed.load_in_4bit and parsed.merge_base == "original",
        }  # fmt: skip
        assert all(value == (which == name) for which, value in changed.items())


def test_the_table_of_ablations_by_hand(inputs, tmp_path):
    def write(name, **models):
        """A results.json of four test inputs, of which each model solves the first so many."""
        keys = [f"a-00{i}_0" for i in range(4)]
        table = [
            {"model": model, "n": 4, "exact_1": count / 4, "exact_1_interval": [0, 1]}
            for model, count in models.items()
        ]
        puzzles = {
            key: {model: {"correct": [at < count]} for model, count in models.items()} for at, key in enumerate(keys)
        }
        learn.write_json(
            tmp_path / "evaluation" / name / "results.json",
            {"models": list(models), "table": table, "puzzles": puzzles},
        )

    chain = chain_of(inputs, "--output_dir", str(tmp_path))
    assert learn.ablation_rows(chain) == []
    write("ablations-seen", **{"stage1": 0, "masked": 2, "all-tokens": 1, "4bit-quantised": 3})
    write("ablations-4bit-seen", **{"4bit-quantised": 1, "4bit-original": 3})
    rows = {row["name"]: row["seen"] for row in learn.ablation_rows(chain)}
    assert {name: row["exact_1"] for name, row in rows.items()} == {
        "stage1": 0, "masked": 0.5, "all-tokens": 0.25, "4bit-quantised": 0.75,
        "4bit-quantised (loaded in 4 bits)": 0.25, "4bit-original (loaded in 4 bits)": 0.75,
    }  # fmt: skip
    assert rows["all-tokens"]["to_masked"]["points"] == -25 and rows["4bit-quantised"]["to_masked"]["points"] == 25
    assert rows["4bit-original (loaded in 4 bits)"]["to_4bit-quantised"]["points"] == 50
    assert all("to_masked" not in rows[name] for name in ("stage1", "masked"))


def test_evaluations_of_one_model_each_stand_in_for_that_of_all(inputs, tmp_path):
    chain = chain_of(inputs, "--output_dir", str(tmp_path), "--together", "2")
    for model in ("base", "stage1"):
        folder = tmp_path / learn.MODELS[model]
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    first, *_, last = filter(None, chain.jobs(["greedy", "search"]))
    names = [
        f"single-{kind}-{model}-{s}"
        for kind in ("greedy", "search")
        for model in ("base", "stage1")
        for s in learn.SETS
    ]
    assert [job.name for job in first] == names
    assert [job.name for job in last] == ["greedy-seen", "greedy-unseen", "search-seen", "search-unseen"]
    assert len({job.command[job.command.index("--cache_dir") + 1] for job in [*first, *last]}) == 1
    assert learn.read_results(chain, "greedy-seen") is None
    for job in first:
        if job.name.startswith("single-greedy") and job.name.endswith("-seen"):
            model = job.name.split("-")[2]
            puzzles = {f"a-00{i}_0": {model: {"correct": [i < ("base", "stage1").index(model)]}} for i in range(2)}
            learn.write_json(job.result, {"models": [model], "table": [{"model": model}], "puzzles": puzzles})
            chain.note(job, 1.0, done=True)
    found = learn.read_results(chain, "greedy-seen")
    assert found["models"] == ["base", "stage1"] and found["table"] == [{"model": "base"}, {"model": "stage1"}]
    assert learn.right(found, "stage1") == {"a-000_0": True, "a-001_0": False}
    assert learn.right(found, "base") == {"a-000_0": False, "a-001_0": False}
    assert learn.read_results(chain, "greedy-unseen") is None and learn.read_results(chain, "search-seen") is None
    assert learn.ablation_rows(chain) == [] and learn.grpo_gain(chain) is None
    (tmp_path / learn.MODELS["stage1"] / "manifest.json").write_text('{"made": "anew"}')
    assert learn.read_results(chain, "greedy-seen")["models"] == ["base"]
    learn.write_json(tmp_path / "evaluation" / "greedy-seen" / "results.json", {"models": ["stage3"]})
    assert learn.read_results(chain, "greedy-seen") == {"models": ["stage3"]}  # side by side: that is taken


def test_the_one_model_that_is_new_is_evaluated_with_all(inputs, tmp_path):
    chain = chain_of(inputs, "--output_dir", str(tmp_path), "--together", "2")
    for model in ("base", "stage1", "stage2"):
        (tmp_path / learn.MODELS[model]).mkdir()
        (tmp_path / learn.MODELS[model] / "manifest.json").write_text("{}")
    for job in chain.extras():
        job.result.parent.mkdir()
        job.result.write_text("")
    alone = ["stage3", "greedy", "search"], []
    for pieces, more in (alone, alone, (["stage3", "seeds", "greedy"], ["single-greedy"])):
        parts, named = chain.jobs(pieces), []
        for jobs in parts:
            if not named:  # the trainings, beside evaluations of what was there before
                assert {"stage3", "single-greedy-base-seen"} <= {job.name for job in jobs}
                (tmp_path / learn.MODELS["stage3"]).mkdir(exist_ok=True)
                (tmp_path / learn.MODELS["stage3"] / "manifest.json").write_text("{}")
            named.append([job.name for job in jobs if "stage3-seed" not in job.name])
        assert more or not any("-stage3-" in name for name in named[0]), "also where it was there before"
        assert [f"{kind}-stage3-seen" in named[1] for kind in ("single-greedy", "single-search")] == [bool(more), False]
        assert "greedy-unseen" in named[-1] and len(named) == (4 if more else 2)
        if more:
            shutil.rmtree(tmp_path / learn.MODELS["stage3"])


def test_the_gain_of_several_seeds_is_their_mean(learned, tmp_path):
    inputs, _ = learned
    chain = chain_of(inputs)
    found = results(inputs, "greedy-unseen")
    found = {"models": ["stage2", "stage3", "stage3-seed45"], "puzzles": found["puzzles"], "table": []}
    right = [{"correct": [True], "prob_truth": 0.75}, {"correct": [False], "prob_truth": 0.25}]
    for entry in found["puzzles"].values():
        entry["stage2"], entry["stage3"], entry["stage3-seed45"] = right[1], right[0], right[1]
    path = inputs / "output" / "evaluation" / "seeds-unseen" / "results.json"
    learn.write_json(path, found)
    try:
        gain = learn.grpo_gain(chain)["unseen"]
    finally:
        path.unlink()
    assert gain["points"] == 50 and gain["n"] == len(found["puzzles"])
    assert gain["sampled"]["points"] == 25 and gain["sampled"]["ci"][0] < 25 < gain["sampled"]["ci"][1]
    assert {name: one["points"] for name, one in gain["seeds"].items()} == {"stage3": 100, "stage3-seed45": 0}
