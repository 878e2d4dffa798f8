"""Settings and order of rows; what the scripts say to a user's mistakes stands in test_stages.py."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import base_finetune
import base_finetune_final
import train_grpo
from arc.puzzles import splits
from arc.puzzles.dataset import ArcDataset
from arc.runs.settings import find_problems, parse_settings
from arc.training.arguments import loader_processes
from arc.training.rows import EpochSampler, planned_rows

ROOT = Path(__file__).resolve().parents[2]

# The published table: the defaults of stage 1 that users can rely on.
PUBLISHED = {
    "base_model": "meta-llama/Llama-3.2-1B-Instruct",
    "lora_r": 512,
    "lora_alpha": 24,
    "lora_dropout": 0,
    "use_rslora": True,
    "random_state": 42,
    "target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split(),
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-4,
    "embedding_learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.25,
    "optim": "adamw_8bit",
    "adam_beta2": 0.999,
    "weight_decay": 0,
    "max_seq_length": 1536,
    "seed": 42,
    "dataset_dir": "dataset",
    "n": None,
    "sizes": [6],
    "dataset_seed": 42,
    "tp": "all",
    "rt": "all",
    "perm": True,
    "shfl_ex": True,
    "merge_base": "quantised",
}


def test_defaults_of_stage_1_are_the_published_ones():
    defaults = dataclasses.asdict(base_finetune.Settings())
    assert {name: defaults[name] for name in PUBLISHED} == PUBLISHED


def test_readme_table_says_what_the_code_does():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    table = dict(rows)
    assert set(PUBLISHED) <= set(table)
    defaults = dataclasses.asdict(base_finetune.Settings())
    for name, written in table.items():
        value = defaults[name]
        if isinstance(value, list):
            assert written.split() == [str(v) for v in value], name
        elif isinstance(value, bool) or value is None:
            assert written == {True: "true", False: "false", None: "not set"}[value], name
        elif isinstance(value, (int, float)):
            assert float(written) == value, name
        else:
            assert written == value, name


@pytest.mark.parametrize("module", [base_finetune, base_finetune_final, train_grpo])
def test_every_setting_is_a_flag_with_a_sentence(module):
    for field in dataclasses.fields(module.Settings):
        assert field.metadata["help"], field.name
    assert parse_settings(module.Settings, []) == module.Settings()


def test_flags_win_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 3e-4\nsizes: [3, 4]\nperm: false\nmax_steps: 7\nn: 5\n")
    settings = parse_settings(
        base_finetune.Settings, ["--config", str(config), "--max_steps", "9", "--engine", "transformers"]
    )
    got = (settings.learning_rate, settings.sizes, settings.perm, settings.max_steps, settings.n, settings.engine)
    assert got == (3e-4, [3, 4], False, 9, 5, "transformers")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown flags: --learning_rat 1"),
        (
            ["--learning_rate", "-1", "--lora_r", "0"],
            r"--learning_rate is -1.0: expected a number above 0\n.*--lora_r is 0",
        ),
        (["--learning_rate", "nan"], "--learning_rate is nan: expected a number above 0"),
        (["--sizes", "0"], r"--sizes is \[0\]: expected whole numbers from 1"),
        (["--engine", "jax"], "--engine is 'jax': expected auto or unsloth or transformers"),
        (["--target_modules", "embed_tokens"], "not only embeddings"),
        (["--grid_sizes", "5"], "expected two bounds"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--max_steps", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_settings_are_refused_together_in_one_message(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse_settings(base_finetune.Settings, flags)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1\n", "unknown settings learnin_rate"),
        ("- 1\n", "found a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_config_files_are_refused(capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_settings(base_finetune.Settings, ["--config", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_default_is_a_problem():
    for module in (base_finetune, base_finetune_final, train_grpo):
        assert find_problems(module.Settings()) == []


def test_a_training_has_rows_for_every_epoch_that_it_enters():
    data = SimpleNamespace(samples=range(10))
    for steps, epochs, rows in ((-1, 1.0, 20), (-1, 2.5, 40), (1, 1.0, 20), (50, 1.0, 410)):
        settings = base_finetune.Settings(max_steps=steps, num_train_epochs=epochs)
        run = SimpleNamespace(settings=settings)
        assert planned_rows(run, data, rows_per_step=8) == rows


def test_processes_make_the_batches_where_the_main_one_would_keep_a_gpu_waiting(monkeypatch):
    few, many = (SimpleNamespace(dataloader_num_workers=None, samples_per_step=size) for size in (31, 32))
    assert loader_processes(many, "transformers") == (2 if torch.cuda.is_available() else 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader_processes(many, "transformers") == 2
    assert loader_processes(few, "transformers") == loader_processes(many, "unsloth") == 0
    for asked in (0, 3):
        assert loader_processes(SimpleNamespace(dataloader_num_workers=asked, samples_per_step=8), "unsloth") == asked


def test_order_of_rows_depends_on_seed_and_epoch_alone():
    sampler = EpochSampler(10, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == list(range(10))
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(10, 20))  # the rows of epoch 1 are its own
    assert [row - 10 for row in second] != first
    assert list(EpochSampler(10, seed=4)) != first
    assert len(sampler) == 10


def test_the_first_held_out_puzzles_stand_for_all_tasks(tmp_path):
    counts = {"many": 40, "some": 9, "few": 2}
    for task, count in counts.items():
        pairs = [{"input": [[i // 10, i % 10]], "output": [[i % 10]]} for i in range(2 * count)]
        (tmp_path / f"{task}.json").write_text(json.dumps(pairs))
    ds = ArcDataset.load_from_local_json(tmp_path, sizes=(1,), seed=0)
    ordered = splits.tasks_in_turn(ds, seed=1)
    tasks = [ds.task_of(key) for key in ordered.keys]
    assert sorted(ordered.keys) == sorted(ds.keys) and len(tasks) == 51
    assert {*tasks[:3]} == {*tasks[3:6]} == {*counts} and {*tasks[6:8]} == {"many", "some"}
    assert tasks[20:] == ["many"] * 31
    assert [key for key in ordered.keys if "many" in key] != [key for key in ds.keys if "many" in key]
    assert ordered.keys == splits.tasks_in_turn(ds, seed=1).keys
    assert ordered.keys != splits.tasks_in_turn(ds, seed=2).keys
