"""What the documents tell a user to type exists and is understood, and the README's commands are run."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from arc.models.lora import EMBEDDING_MODULES, LINEAR_MODULES
from arc.puzzles.dataset import ArcDataset
from arc.runs.needs import count_weights, disk_needs, memory_needs
from arc.runs.settings import parse_settings
from tests.helpers import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
STAGES = ("base_finetune", "base_finetune_final", "train_grpo", "evaluate_arc")


def blocks(document):
    """Fenced blocks: their language and their text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        found = [line for language, block in blocks(document) if language in ("", "bash") for line in joined(block)]
        found += re.findall(r"`((?:python|make|\.venv/bin/\w+) [^`\n]+)`", text)
        for line in dict.fromkeys(found):
            line = line.partition("  #")[0].strip()
            if re.match(r"([A-Z_]+=\S+ )*(python|make|pip|hf|\.venv/bin/)", line):
                yield pytest.param(line, id=f"{document}: {line[:60]}")


def joined(block):
    return re.sub(r"\\\n\s*", " ", block).splitlines()


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_understood(line, capsys):
    for part in re.split(r"\s*&&\s*", line):
        words = [word for word in shlex.split(part) if word != "..."]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        program, *rest = words
        if program == "make":
            targets = (ROOT / "Makefile").read_text(encoding="utf-8")
            for word in rest:
                assert "=" in word or re.search(rf"^{word}:", targets, flags=re.MULTILINE), f"make knows no {word}"
        elif program == "pip":
            assert rest[0] == "install"
            assert rest[1] != "-r" or (ROOT / rest[2]).is_file()
        elif program.endswith("/python") and rest[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
        elif program == "python":
            check_script(rest, capsys)


def check_script(words, capsys):
    script, *flags = words
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if path.stem in STAGES:
        if path.stem == "evaluate_arc" and "--models" in flags and flags[-1] == "--models":
            flags = [*flags, "MODEL"]
        if flags and not flags[0].startswith("-"):
            flags = []
        parse_settings(importlib.import_module(path.stem).Settings, flags)
        return
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--")):
        assert flag in done.stdout, f"{script} knows no {flag}"


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_commands_as_they_are_written(stage, capsys):
    module = importlib.import_module(stage)
    with pytest.raises(SystemExit):
        parse_settings(module.Settings, ["--help"])
    printed = capsys.readouterr().out
    assert module.__doc__.strip() in printed and "None" not in printed and "--no_" not in printed
    assert printed.count("--dataset_dir VALUE") == 1 and printed.count("dataset-dir") == 0


def test_python_in_the_readme_runs(demo_dataset, tmp_path, monkeypatch):
    (tmp_path / "dataset").symlink_to(demo_dataset)
    monkeypatch.chdir(tmp_path)
    found = [block for language, block in blocks("README.md") if language == "python"]
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


def test_files_that_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / link).exists(), f"{document} links to {link}"
        for name in re.findall(r"\b((?:tests|benchmarks|demo)/\w+\.(?:py|md|yaml))\b", text):
            assert (ROOT / name).exists(), f"{document} names {name}"
        for name in re.findall(r"^(\w+\.py) ", text, flags=re.MULTILINE):
            assert (ROOT / name).exists(), f"{document} names {name}"
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        path.name for path in ROOT.glob("*.py") if not re.search(rf"^{re.escape(path.name)} ", tree, re.MULTILINE)
    ]
    assert not missing, f"the README's file tree lacks {missing}"


# ---------------------------------------------------------------------------------------------------------------------
# The README's commands, one after the other in a copy of the project. Later flags win, so that what is added here makes
# a command small and changes nothing else about it.

LANGUAGES = {"bash", "python", "json", "text"}
STAGE_FLAGS = ["--max_steps", "2", "--eval_puzzles", "1", "--eval_steps", "2", "--logging_steps", "1"]
SMALL_FLAGS = {
    "base_finetune.py": ["--base_model", "small_base", *STAGE_FLAGS],
    "base_finetune_final.py": STAGE_FLAGS,
    "train_grpo.py": [*STAGE_FLAGS, "--per_device_eval_batch_size", "2"],
    "evaluate_arc.py": ["--puzzles", "2", "--views", "2", "--max_new_tokens", "40"],
}


class Command(NamedTuple):
    """A line of a bash block: what is typed, and what the comments say that it needs."""

    line: str
    needs: str


def readme_commands():
    """The commands of the README's bash blocks in order; a comment line is about the rest of its block."""
    for language, block in blocks("README.md"):
        of_block = ""
        for line in joined(block) if language == "bash" else ():
            command, _, comment = line.partition("#")
            if command.strip():
                yield Command(command.strip(), f"{of_block} {comment}")
            else:
                of_block += comment


def needs_network(command):
    return re.search(r"needs\b.*\bnetwork", command.needs) is not None


def run_command(command, monkeypatch):
    """Run a command of the README in the present folder; returns its exit code and what it printed.

    Scripts run in this process, each as `__main__`: a dozen processes would spend most of their time on imports.
    """
    words = shlex.split(command.line)
    while re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, *rest = words
    if program in ("torchrun", "accelerate"):  # several processes are for test_distributed.py: here the script alone
        script = next(at for at, word in enumerate(words) if word.endswith(".py"))
        program, *rest = "python", *words[script:]
    if program == "python" and rest[0].endswith(".py"):
        few = ["--programs", "20"] if "--programs" in rest else ["--workers", "1"] if "--changed_from" in rest else []
        return run_script(rest[0], [*rest[1:], *few, *SMALL_FLAGS.get(Path(rest[0]).name, [])], monkeypatch)
    if program == "make":  # the demo and the tests themselves take minutes: a dry run finds targets and variables
        words.append("--dry-run")
    elif program == "tensorboard":  # shows what there is and ends, where the server would run until it is stopped
        words.append("--inspect")
    else:
        assert program == "source", f"README: `{command.line}` is neither run here nor marked as needing the network"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shlex.join(words)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def run_script(script, flags, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))  # scripts add to it
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0, printed.getvalue()
    return 0, printed.getvalue()


def make_folder(to):
    """A folder to type commands in: the project's files beside its code, which is run from where it is."""
    (to / "demo").mkdir(parents=True)
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt"), *ROOT.glob("demo/*.yaml")):
        shutil.copy(path, to / path.relative_to(ROOT))
    (to / ".venv").symlink_to(sys.prefix)
    return to


def make_inputs(folder):
    """What a reader brings: weights (tiny ones), re-arc's output, official puzzles, and the competition's files."""
    from demo import make_base, make_dataset

    make_base.main(["--out", str(folder / "small_base")])
    generated = folder / "generated"
    make_dataset.main(["--out", str(generated), "--tasks_per_family", "1", "--examples", "60", "--max_side", "4"])
    tasks = folder / "re_arc" / "tasks"
    shutil.copytree(generated, tasks, ignore=shutil.ignore_patterns("*.txt"))
    names = sorted(path.stem for path in tasks.iterdir())
    (folder / "re_arc" / "metadata.json").write_text(json.dumps(dict.fromkeys(names, {})))
    (folder / "my_tasks").mkdir()
    challenges, solutions = {}, {}
    for name in names[:4]:
        pairs = json.loads((tasks / f"{name}.json").read_text())
        (folder / "my_tasks" / f"{name}.json").write_text(json.dumps({"train": pairs[:3], "test": pairs[3:4]}))
        challenges[name] = {"train": pairs[:3], "test": [{"input": pairs[3]["input"]}]}
        solutions[name] = [pairs[3]["output"]]
    (folder / "arc-agi_evaluation_challenges.json").write_text(json.dumps(challenges))
    (folder / "arc-agi_evaluation_solutions.json").write_text(json.dumps(solutions))


def test_the_readme_is_followed_word_by_word(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "arc"))
    make_inputs(Path())
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")
    printed = {}
    for command in dict.fromkeys(readme_commands()):
        if needs_network(command):
            continue
        begin = time.perf_counter()
        with monkeypatch.context() as patch:
            code, printed[command.line] = run_command(command, patch)
        print(f"{time.perf_counter() - begin:5.1f} s: {command.line}")  # shown if this fails
        assert code == 0, f"README: `{command.line}` ended with {code}:\n{printed[command.line][-4000:]}"
    smaller = [text for line, text in printed.items() if "--micro_batch_size" in line]
    assert smaller and all("training skipped" in text for text in smaller), "they are said to be the same training"


def test_blocks_of_the_readme_say_what_they_are():
    assert {language for language, _ in blocks("README.md")} == LANGUAGES
    marked = [command for command in readme_commands() if "needs" in command.needs]
    assert marked and all(re.search(r"needs (CUDA|the network)", command.needs) for command in marked)


def test_task_files_of_the_readme_are_read(tmp_path):
    for number, block in enumerate(block for language, block in blocks("README.md") if language == "json"):
        (tmp_path / f"task{number}.json").write_text(block)
    dataset = ArcDataset.load_from_local_json(tmp_path, sizes=(2,))
    assert sorted(dataset.challenge) == ["task0-000", "task1"] and sorted(dataset.solutions) == ["task0-000", "task1"]


def test_computed_needs_in_the_readme():
    """The table of what training takes, against the functions that the scripts ask."""
    from transformers import LlamaConfig

    # Llama-3.2-1B; 79 tokens are left of its vocabulary.
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    unsloth = {"engine": "unsloth", "dtype": "bfloat16", "load_in_4bit": True}
    transformers = {"engine": "transformers", "dtype": "bfloat16", "load_in_4bit": False}
    rows = {
        "stage 1, in 4 bits": (unsloth, 512, 79, True),
        "stages 2 and 3, in 4 bits, each": (unsloth, 512, 79, False),
        "stage 1, in 16 bits (`--engine transformers`)": (transformers, 512, 79, True),
        "stage 1, in 4 bits, `--lora_r 128`": (unsloth, 128, 79, True),
        "stage 1, in 4 bits, `--full_vocab true`": (unsloth, 512, None, True),
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (precision, rank, vocabulary, prepared) in rows.items():
        modules = LINEAR_MODULES + EMBEDDING_MODULES
        counts = count_weights(config, target_modules=modules, r=rank, vocabulary=vocabulary)
        needs = [need.total for need in memory_needs(counts, **precision, optim="adamw_8bit")]
        disk = disk_needs(counts, optim="adamw_8bit", checkpoints=2, prepared=prepared)
        checkpoints = disk.parts["3 checkpoints"]
        needs += [disk.total, disk.total - checkpoints // 3, disk.total - checkpoints]
        row = " | ".join([f"| {name}", *(f"{need / 2**30:.1f} GiB" for need in needs)]) + " |"
        assert row in text, f"README lacks the row\n{row}"
