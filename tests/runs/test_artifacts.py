"""Artifacts: complete or not there, damaged or whole, up to date or outdated; one run at a time."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import base_finetune
from arc.models.manifests import read_manifest, write_manifest
from arc.puzzles.files import write_atomically
from arc.runs import artifacts
from arc.runs.artifacts import find_damage, fingerprint, new_folder
from arc.runs.freshness import changed_settings, find_outdated, made_from
from arc.runs.lock import OutputLock
from tests.helpers import ROOT


def make(path, value=0.0, made=None):
    """A sealed folder like an artifact: one tensor, a configuration, a manifest that says what it was made from."""
    with new_folder(path) as beside:
        save_file({"w": np.full(4, value, dtype=np.float32)}, beside / "model.safetensors")
        (beside / "config.json").write_text("{}")
        (beside / "metrics.jsonl").write_text(f"{value} {path}")
        write_manifest(beside, {"made_from": made or {}, "script": f"{path.name}.py", "made": str(value)})
    return path


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "artifact"
    with pytest.raises(RuntimeError, match="stopped"), new_folder(target) as beside:
        (beside / "half").write_text("x")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "artifact.incomplete").mkdir()  # what a killed run leaves
    (tmp_path / "artifact.incomplete" / "half").write_text("x")
    with new_folder(target) as beside:
        assert list(beside.iterdir()) == []
        (beside / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert [p.name for p in target.iterdir()] == ["whole"]
    with pytest.raises(FileExistsError), new_folder(target):
        pass


def test_the_manifest_names_every_file_with_its_hash(tmp_path):
    folder = make(tmp_path / "a")
    table = read_manifest(folder)["files"]
    assert set(table) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    import hashlib

    content = (folder / "config.json").read_bytes()
    assert table["config.json"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert table["config.json"]["bytes"] == 2
    assert find_damage(folder) is None


def test_an_unchanged_file_is_not_read_and_a_copied_one_is(tmp_path, monkeypatch):
    folder = make(tmp_path / "a")
    read = []
    real = artifacts._sha256
    monkeypatch.setattr(artifacts, "_sha256", lambda path: read.append(path.name) or real(path))
    assert find_damage(folder) is None
    assert read == []
    copy = tmp_path / "b"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # new times
    assert find_damage(copy) is None
    assert sorted(read) == ["config.json", "model.safetensors"]  # what is about the model may change
    (folder / "metrics.jsonl").write_text("looked at and edited")
    assert find_damage(folder) is None


def test_a_file_is_written_whole_or_not_at_all_and_with_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "numbers.safetensors"
    weights = {"w": np.zeros(4, dtype=np.float32)}
    before = os.umask(0o027)
    try:
        write_atomically(path, lambda beside: save_file(weights, beside))
        write_atomically(tmp_path / "text", "ü")
        write_atomically(tmp_path / "bytes", b"\xff", several_writers=True)
    finally:
        os.umask(before)
    assert load_file(path)["w"].tolist() == [0] * 4
    assert ((tmp_path / "text").read_bytes(), (tmp_path / "bytes").read_bytes()) == (b"\xc3\xbc", b"\xff")
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == dict.fromkeys(
        ("numbers.safetensors", "text", "bytes"), 0o640
    )

    def fail(beside):
        beside.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "text", fail)
    assert (tmp_path / "text").read_text(encoding="utf-8") == "ü"
    assert len(list(tmp_path.iterdir())) == 3


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: os.truncate(f / "model.safetensors", 50), "model.safetensors has 50 bytes, not "),
        (lambda f: flip_byte(f / "model.safetensors"), "model.safetensors is not the file that was written"),
        (lambda f: (f / "manifest.json").write_text('{"files": '), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json"),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), "it is no folder"),
    ],
    ids=["missing", "truncated", "flipped", "manifest-cut", "manifest-list", "manifest-binary", "file"],
)
def test_damage_is_found_and_named(tmp_path, harm, words):
    folder = make(tmp_path / "a")
    harm(folder)
    assert words in find_damage(folder)


def test_a_fingerprint_is_of_the_model_and_not_of_its_logs(tmp_path):
    one, same, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", value=1.0)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert read_manifest(one)["files"]["metrics.jsonl"] != read_manifest(same)["files"]["metrics.jsonl"]
    foreign = tmp_path / "d"
    shutil.copytree(one, foreign)
    (foreign / "manifest.json").unlink()
    assert fingerprint(foreign) == fingerprint(one)
    assert fingerprint("meta-llama/Llama-3.2-1B-Instruct") != fingerprint("meta-llama/Llama-3.2-3B-Instruct")


def test_what_was_made_from_something_else_is_found_through_the_chain(tmp_path):
    base = make(tmp_path / "prepared")
    lora = make(tmp_path / "lora", made=made_from(base, tmp_path / "lora"))
    merged = make(tmp_path / "merged", made=made_from(lora, tmp_path / "merged"))
    assert list(read_manifest(lora)["made_from"]) == ["prepared"]
    assert find_outdated(merged) is None
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in (base, lora, merged):
        folder.rename(moved / folder.name)
    assert find_outdated(moved / "merged") is None  # a whole output folder may move
    shutil.rmtree(moved / "prepared")
    assert find_outdated(moved / "merged") is None  # what is gone is taken on trust
    make(moved / "prepared", value=2.0)
    assert "lora was made from another prepared" in find_outdated(moved / "merged")
    assert "run lora.py again, as it was run, with --overwrite" in find_outdated(moved / "merged")


def test_a_parent_from_outside_is_named_by_its_path(tmp_path):
    base = make(tmp_path / "somewhere" / "base")
    lora = make(tmp_path / "output" / "lora", made=made_from(base, tmp_path / "output" / "lora"))
    assert list(read_manifest(lora)["made_from"]) == [str(base)]
    shutil.rmtree(base)
    make(base, value=1.0)
    assert "was made from another" in find_outdated(lora)
    assert made_from("meta-llama/X", lora) == {"meta-llama/X": fingerprint("meta-llama/X")}


def test_moving_aside_keeps_everything(tmp_path):
    for number in (1, 2):
        make(tmp_path / "a", value=float(number))
        assert artifacts.move_aside(tmp_path / "a").name == f"a.old-{number}"
    assert [load_file(tmp_path / f"a.old-{n}" / "model.safetensors")["w"][0] for n in (1, 2)] == [1, 2]


def test_a_second_run_on_the_same_output_stops_with_a_message(tmp_path):
    lock = OutputLock(tmp_path / "out", "base_finetune.py")
    lock.acquire()
    lock.acquire()  # its own lock is no obstacle
    with pytest.raises(BlockingIOError, match=rf"out is in use by base_finetune.py \(process {os.getpid()} on "):
        OutputLock(tmp_path / "out", "train_grpo.py").acquire()
    lock.release()
    OutputLock(tmp_path / "out", "train_grpo.py").acquire()


def test_a_dead_process_holds_no_lock(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import arc.runs.lock as a\n"
        "lock = a.OutputLock(Path(sys.argv[1]), 'x'); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path, ROOT], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError):
        OutputLock(tmp_path, "y").acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    OutputLock(tmp_path, "y").acquire()


@pytest.fixture
def model(tmp_path, demo_base):
    folder = tmp_path / "model"
    shutil.copytree(demo_base, folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def larger_tokenizer(folder):
    path = folder / "tokenizer.json"
    tables = json.loads(path.read_text())
    tables["model"]["vocab"]["zzzz"] = 100_000
    path.write_text(json.dumps(tables))


def without_a_tensor(folder):
    weights = load_file_as_bits(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    from safetensors.torch import save_file as save

    save(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_file_as_bits(path):
    from safetensors.torch import load_file as load

    return load(path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "it holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is of no model"),
        (lambda f: (f / "tokenizer.json").unlink(), "it holds no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"w": "m-2.safetensors"}}'), "m-2"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index of weights"),
        (lambda f: edit_config(f, hidden_size=96), "config.json asks for"),
        (lambda f: edit_config(f, num_hidden_layers=9), "its weights lack model.layers."),
        (lambda f: edit_config(f, tie_word_embeddings=False), "its weights lack lm_head.weight"),
        (without_a_tensor, "its weights lack model.norm.weight"),
        (larger_tokenizer, "ids up to 100000"),
    ],
)
def test_a_model_made_elsewhere_is_looked_through(capsys, model, harm, words):
    assert find_damage(model) is None
    assert "made elsewhere" in capsys.readouterr().out
    harm(model)
    assert words in find_damage(model)


def test_settings_that_decide_the_weights_are_compared_and_others_are_not():
    import dataclasses

    settings = base_finetune.Settings()
    recorded = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "precision": {"engine": "unsloth", "dtype": "bfloat16", "load_in_4bit": True},
        "data_fingerprint": "d1",
    }
    compare = changed_settings
    assert compare(recorded, settings, {}, "d1") == []
    other = dataclasses.replace(
        settings, output_dir="elsewhere", logging_steps=3, save_steps=7, report_to="wandb", dry_run=True, eval_steps=1
    )
    assert compare(recorded, other, {}, None) == []
    other = dataclasses.replace(settings, lora_r=8, sizes=[3, 4], n=5)
    assert compare(recorded, other, {}, "d2") == [
        "n (was not set, is 5)", "sizes (was 6, is 3 4)", "lora_r (was 512, is 8)"
    ]  # fmt: skip
    assert compare(recorded, settings, {}, "d2") == ["the puzzles in dataset"]
    assert compare(recorded, settings, {"load_in_4bit": False}, None) == ["load_in_4bit (was true, is false)"]
    assert compare(recorded, settings, {"load_in_4bit": True}, None) == []


def test_a_removed_setting_counts_only_where_it_was_not_at_its_default():
    settings = base_finetune.Settings()
    recorded = json.loads(json.dumps(dataclasses.asdict(settings)))
    before = recorded | {"task_augmentation": 0.0, "lora_bias": "none", "use_vllm": False}
    assert changed_settings({"settings": before}, settings, {}, None) == []
    assert changed_settings({"settings": before | {"task_augmentation": 0.5}}, settings, {}, None) == [
        "task_augmentation (was 0.5, this setting was removed)"
    ]
    assert changed_settings({"settings": before | {"lora_bias": "all"}}, settings, {}, None) == [
        "lora_bias (was all, this setting was removed)"
    ]


def test_every_setting_is_either_of_the_course_or_not():
    import train_grpo
    from arc.runs.settings import NOT_THE_COURSE, SupervisedSettings

    stages = (SupervisedSettings, train_grpo.Settings)
    assert set(NOT_THE_COURSE) <= {field.name for stage in stages for field in dataclasses.fields(stage)}
