"""The benchmark that kills the stages, in small: stage 1 alone and three kills. `make torture` is the whole."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tests.script_processes import Script

sys.path.insert(0, str(ROOT / "benchmarks"))

import torture


def test_stage_1_killed_three_times_ends_in_the_files_of_an_uninterrupted_run(tmp_path, monkeypatch, capsys):
    results, work = tmp_path / "torture.json", tmp_path / "work"
    flags = ("--kills", 3, "--seed", 1, "--workers", 1, "--stages", 1, "--work_dir", work, "--results", results)
    sessions, survivors = [], torture.survivors

    def start(script, flags, log, temporary):
        """Start a stage as torture.start does, but most of them without importing the libraries."""
        temporary.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            # One by an interpreter of its own: forks have the hashes of strings, which decide orders, in common.
            fresh = len(sessions) == 4
            process = Script(script, *flags, fresh=fresh, own_session=True, log=file, **torture.environment(temporary))
        sessions.append(process.pid)
        return process

    def survivors_of_sessions(output):
        """Those that it has forked have a command that names nothing."""
        found = survivors(output)
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                found += [int(entry.name)] * (os.getsid(int(entry.name)) in sessions)
        return found

    monkeypatch.setattr(torture, "start", start)
    monkeypatch.setattr(torture, "survivors", survivors_of_sessions)
    monkeypatch.setattr(sys, "argv", ["torture.py", *map(str, flags)])
    assert torture.main() == 0, capsys.readouterr().out[-5000:]
    printed = capsys.readouterr().out
    result = json.loads(results.read_text(encoding="utf-8"))
    assert result["kills"] == len(result["rows"]) == sum(result["kills_by_phase"].values()) == 3
    assert result["bit_identical"] == {"prepared": True, "Base-lora": True, "Base-merged": True}
    assert result["problems"] == []
    assert all(row["steps_lost"] <= 4 for row in result["rows"])
    assert len(sessions) >= 6, "the reference, three that are killed, one to the end, and one that skips all"
    assert "no differences, nothing left over" in printed


def test_a_folder_that_is_there_is_not_worked_in(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "torture.py")]
    done = subprocess.run([*script, "--work_dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
