"""What the documents tell a user to type exists, and is understood."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from run_settings import parse_settings

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
STAGES = ("base_finetune", "base_finetune_final", "train_grpo", "evaluate_arc")


def blocks(document):
    """Fenced blocks: their language and their text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        found = [line for language, block in blocks(document) if language == "" for line in joined(block)]
        found += re.findall(r"`((?:python|make|\.venv/bin/\w+) [^`\n]+)`", text)
        for line in dict.fromkeys(found):
            line = line.partition("  #")[0].strip()
            if re.match(r"(python|make|pip|hf|\.venv/bin/)", line):
                yield pytest.param(line, id=f"{document}: {line[:60]}")


def joined(block):
    return re.sub(r"\\\n\s*", " ", block).splitlines()


@pytest.mark.parametrize("line", commands())
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
            assert rest[:2] == ["install", "-r"] and (ROOT / rest[2]).is_file()
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
