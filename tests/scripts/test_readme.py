"""What documents tell a user to type is understood and runs; they stay short, and their links lead somewhere."""

import contextlib
import functools
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

# For users, in the order in which they are read: later commands need what earlier ones have made.
FIRST = ("README.md", *(f"docs/{name}.md" for name in ("data", "training", "reinforcement-learning", "evaluation")))
USER_DOCUMENTS = tuple(dict.fromkeys((*FIRST, *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))))
DOCUMENTS = (*USER_DOCUMENTS, "CONTRIBUTING.md", "benchmarks/README.md")
STAGES = ("base_finetune", "base_finetune_final", "train_grpo", "evaluate_arc")
MOST_WORDS = 1500


@functools.cache
def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document):
    """Fenced blocks: their language and their text."""
    return re.findall(r"^```(\w*)\n(.*?)^```", read(document), flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every command of every document, once."""
    lines = {}
    for document in DOCUMENTS:
        found = [line for language, block in blocks(document) if language in ("", "bash") for line in joined(block)]
        found += re.findall(r"`((?:python|make|\.venv/bin/\w+) [^`\n]+)`", read(document))
        for line in found:
            line = line.partition("  #")[0].strip()
            if re.match(r"([A-Z_]+=\S+ )*(python|make|pip|hf|torchrun|accelerate|\.venv/bin/)", line):
                lines.setdefault(line, document)
    return [pytest.param(line, id=f"{document}: {line[:60]}") for line, document in lines.items()]


def joined(block):
    return re.sub(r"\\\n\s*", " ", block).splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Every command is understood


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
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
        elif program in ("torchrun", "accelerate"):
            check_script(rest[next(at for at, word in enumerate(rest) if word.endswith(".py")) :])
        elif program == "python":
            check_script(rest)


def check_script(words):
    script, *flags = words
    if Path(script).stem in STAGES:
        assert (ROOT / script).is_file(), f"there is no {script}"
        if Path(script).stem == "evaluate_arc" and "--models" in flags and flags[-1] == "--models":
            flags = [*flags, "MODEL"]
        if flags and not flags[0].startswith("-"):
            flags = []
        parse_settings(importlib.import_module(Path(script).stem).Settings, flags)
        return
    if script == "-m":
        script = ("-m", flags.pop(0))
    else:
        assert (ROOT / script).is_file(), f"there is no {script}"
        script = (script,)
    printed = printed_help(script)
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--")):
        assert flag in printed, f"{' '.join(script)} knows no {flag}"


@functools.cache
def printed_help(script):
    done = subprocess.run([sys.executable, *script, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_commands_as_they_are_written(stage, capsys):
    module = importlib.import_module(stage)
    with pytest.raises(SystemExit):
        parse_settings(module.Settings, ["--help"])
    printed = capsys.readouterr().out
    assert module.__doc__.strip() in printed and "None" not in printed and "--no_" not in printed
    assert printed.count("--dataset_dir VALUE") == 1 and printed.count("dataset-dir") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Words, links and names


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/settings.md"])  # made from the code
def test_documents_are_short(document):
    words = len(read(document).split())  # as `wc -w` counts them
    assert words <= MOST_WORDS, f"{document} has {words} words, {words - MOST_WORDS} too many"


def anchors(document):
    """What a link can name in a document, as GitHub makes it of the headings."""
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        to = Path(os.path.normpath(Path(document).parent / path)) if path else Path(document)
        if not (ROOT / to).exists() or (anchor and anchor not in anchors(to.as_posix())):
            broken.append(link)
    assert not broken, f"{document} links to {broken}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document):
    folders = "arc|benchmarks|demo|docs|learn|notebooks|tests"
    names = re.findall(rf"\b(?:{folders})/[\w/]+\.(?:py|md|yaml|ipynb)\b", read(document))
    names += re.findall(r"^(\w+\.py) ", read(document), flags=re.MULTILINE)
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing, f"{document} names {missing}"


def test_the_architecture_names_every_file():
    """Its tree has the modules of each room, all of them; its table of changes names files that are there."""
    document, tree = "docs/architecture.md", set()
    room = ""
    for line in next(block for _, block in blocks(document) if "arc/puzzles/" in block).splitlines():
        if title := re.fullmatch(r"(arc/\w+)/", line):
            room = title[1]
        elif line.startswith("  "):
            tree.add(f"{room}/{line.split()[0]}")
        else:
            tree |= set(re.findall(r"\w+\.py", line))
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("arc/*/*.py") if not path.stem.startswith("__")}
    modules |= {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in ROOT.glob("arc/*/*/__init__.py")}
    scripts = {f"{stage}.py" for stage in STAGES}
    assert tree == modules | scripts, (
        f"lacks {sorted((modules | scripts) - tree)}, has {sorted(tree - modules - scripts)}"
    )
    changes = re.findall(r"`(\w+/\w+(?:\.py|\.html|/))`", read(document).partition("## Where to change what")[2])
    assert len(changes) > 20
    missing = [name for name in changes if not (ROOT / "arc" / name).exists()]
    assert not missing, f"{document} names {missing}"


def test_blocks_say_what_they_are():
    assert {language for document in USER_DOCUMENTS for language, _ in blocks(document)} == LANGUAGES
    marked = [command for command in user_commands() if "needs" in command.needs]
    assert marked and all(re.search(r"needs (CUDA|the network)", command.needs) for command in marked)


# ---------------------------------------------------------------------------------------------------------------------
# What documents show is so


def of_language(wanted):
    return [block for document in USER_DOCUMENTS for language, block in blocks(document) if language == wanted]


def test_python_in_the_documents_runs(demo_dataset, tmp_path, monkeypatch):
    (tmp_path / "dataset").symlink_to(demo_dataset)
    monkeypatch.chdir(tmp_path)
    assert of_language("python")
    for block in of_language("python"):
        exec(compile(block, "a document", "exec"), {})


def test_task_files_of_the_documents_are_read(tmp_path):
    for number, block in enumerate(of_language("json")):
        (tmp_path / f"task{number}.json").write_text(block)
    dataset = ArcDataset.load_from_local_json(tmp_path, sizes=(2,))
    assert sorted(dataset.challenge) == ["task0-000", "task1"] and sorted(dataset.solutions) == ["task0-000", "task1"]


def test_computed_needs_in_the_documents():
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
    text = "\n".join(map(read, USER_DOCUMENTS))
    for name, (precision, rank, vocabulary, prepared) in rows.items():
        modules = LINEAR_MODULES + EMBEDDING_MODULES
        counts = count_weights(config, target_modules=modules, r=rank, vocabulary=vocabulary)
        needs = [need.total for need in memory_needs(counts, **precision, optim="adamw_8bit")]
        disk = disk_needs(counts, optim="adamw_8bit", checkpoints=2, prepared=prepared)
        checkpoints = disk.parts["3 checkpoints"]
        needs += [disk.total, disk.total - checkpoints // 3, disk.total - checkpoints]
        row = " | ".join([f"| {name}", *(f"{need / 2**30:.1f} GiB" for need in needs)]) + " |"
        written = re.findall(rf"^{re.escape(f'| {name} |')}.*$", text, flags=re.MULTILINE)
        assert written and set(written) == {row}, f"the documents have {written}, computed:\n{row}"


# ---------------------------------------------------------------------------------------------------------------------
# The commands of README and docs/, one after the other in a copy of the project. Later flags win, so that what is added
# here makes a command small and changes nothing else about it.

LANGUAGES = {"bash", "python", "json", "text"}
STAGE_FLAGS = ["--max_steps", "2", "--eval_puzzles", "1", "--eval_steps", "2", "--logging_steps", "1"]
SMALL_FLAGS = {
    "base_finetune.py": ["--base_model", "small_base", *STAGE_FLAGS],
    "base_finetune_final.py": STAGE_FLAGS,
    "train_grpo.py": [*STAGE_FLAGS, "--per_device_eval_batch_size", "2"],
    "evaluate_arc.py": ["--puzzles", "2", "--views", "2", "--max_new_tokens", "40"],
}


class Command(NamedTuple):
    """A line of a bash block: what is typed, what the comments say that it needs, and the document."""

    line: str
    needs: str
    document: str


def user_commands():
    """The commands of the documents' bash blocks in order; a comment line is about the rest of its block."""
    for document in USER_DOCUMENTS:
        for language, block in blocks(document):
            of_block = ""
            for line in joined(block) if language == "bash" else ():
                command, _, comment = line.partition("#")
                if command.strip():
                    yield Command(command.strip(), f"{of_block} {comment}", document)
                else:
                    of_block += comment


def commands_to_run():
    """What of it can be run here, each line once; measurements (benchmarks/) take a GPU, or minutes."""
    lines = {}
    for command in user_commands():
        if not re.search(r"needs\b.*\bnetwork", command.needs) and "python benchmarks/" not in command.line:
            lines.setdefault(command.line, command)
    return list(lines.values())


def run_command(command, monkeypatch):
    """Run a command in the present folder; returns its exit code and what it printed.

    Scripts run in this process, each as `__main__`: a dozen processes would spend most of their time on imports.
    """
    words = shlex.split(command.line)
    while re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, *rest = words
    if program in ("torchrun", "accelerate"):  # several processes are for tests/runs: here the script alone
        script = next(at for at, word in enumerate(words) if word.endswith(".py"))
        program, *rest = "python", *words[script:]
    if program == "python" and rest[0] == "-m":
        return run_here(rest[1], rest[2:], lambda: runpy.run_module(rest[1], run_name="__main__"), monkeypatch)
    if program == "python" and rest[0].endswith(".py"):
        few = ["--programs", "20"] if "--programs" in rest else ["--workers", "1"] if "--changed_from" in rest else []
        flags = [*rest[1:], *few, *SMALL_FLAGS.get(Path(rest[0]).name, [])]
        script = str(ROOT / rest[0])
        return run_here(rest[0], flags, lambda: runpy.run_path(script, run_name="__main__"), monkeypatch)
    if program == "make":  # the demo and the tests themselves take minutes: a dry run finds targets and variables
        words.append("--dry-run")
    elif program == "tensorboard":  # shows what there is and ends, where the server would run until it is stopped
        words.append("--inspect")
    else:
        assert program == "source", (
            f"{command.document}: `{command.line}` is neither run here nor marked as needing the network"
        )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shlex.join(words)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def run_here(name, flags, start, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))  # scripts add to it
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            start()
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


def test_the_documents_are_followed_word_by_word(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "arc"))
    make_inputs(Path())
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")
    printed = {}
    for command in commands_to_run():
        begin = time.perf_counter()
        with monkeypatch.context() as patch:
            code, printed[command.line] = run_command(command, patch)
        print(f"{time.perf_counter() - begin:5.1f} s: {command.line}")  # shown if this fails
        assert code == 0, f"{command.document}: `{command.line}` ended with {code}:\n{printed[command.line][-4000:]}"
    smaller = [text for line, text in printed.items() if "--micro_batch_size" in line]
    assert smaller and all("training skipped" in text for text in smaller), "they are said to be the same training"
    proven = [text for line, text in printed.items() if "arc.merging" in line]
    assert proven and all("merge proven" in text for text in proven)


def test_the_page_of_settings_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page, "run make settings"
