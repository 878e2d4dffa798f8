"""The benchmark that kills the stages, in small: stage 1 alone and three kills. `make torture` is the whole."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_stage_1_killed_three_times_ends_in_the_files_of_an_uninterrupted_run(tmp_path):
    results, work = tmp_path / "torture.json", tmp_path / "work"
    flags = ("--kills", 3, "--seed", 1, "--workers", 1, "--stages", 1, "--work_dir", work, "--results", results)
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "torture.py", *map(str, flags)],
        capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-5000:]
    result = json.loads(results.read_text(encoding="utf-8"))
    assert result["kills"] == len(result["rows"]) == sum(result["kills_by_phase"].values()) == 3
    assert result["bit_identical"] == {"prepared": True, "Base-lora": True, "Base-merged": True}
    assert result["problems"] == []
    assert all(row["steps_lost"] <= 4 for row in result["rows"])
    assert "no differences, nothing left over" in printed


def test_a_folder_that_is_there_is_not_worked_in(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "torture.py")]
    done = subprocess.run([*script, "--work_dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
