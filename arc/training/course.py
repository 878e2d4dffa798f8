"""What decides the course of a training, written beside its checkpoints: others' checkpoints are refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from arc.puzzles.files import write_atomically
from arc.runs.artifacts import fingerprint
from arc.runs.checkpoints import complete_checkpoints
from arc.runs.freshness import changed_removed
from arc.runs.settings import RunSettings, course_settings, default_course
from arc.training.data import StageData
from arc.training.stage import StageContext

COURSE = "course.json"


def check_course(run: StageContext[RunSettings], data: StageData) -> None:
    """Refuse the checkpoints of a run with other settings or data; with --overwrite, add them to `run.to_move`.

    Raises:
        ValueError: the checkpoints do not fit, and --overwrite is not set.
    """
    path = run.work / COURSE
    if run.work in run.to_move or not path.is_file() or not complete_checkpoints(run.work, quiet=True):
        return
    try:
        # An earlier version without a setting did what is the default now.
        before = default_course(type(run.settings)) | json.loads(path.read_text(encoding="utf-8"))
        course = _course(run, data)
        changed = sorted(name for name in course if name in before and before[name] != course[name])
        changed += changed_removed(before, course)
    except (ValueError, TypeError):
        changed = [f"{path} cannot be read"]
    if not changed:
        return
    problem = f"{run.work} holds checkpoints of a run with other settings ({', '.join(changed)})"
    if not run.settings.overwrite:
        raise ValueError(f"{problem}: use those, or --overwrite, which moves them aside and starts anew")
    print(f"{problem}: it will be moved aside")
    run.to_move.append(run.work)


def write_course(run: StageContext[RunSettings], data: StageData) -> None:
    """Write the file beside the checkpoints."""
    write_atomically(run.work / COURSE, json.dumps(_course(run, data), indent=2) + "\n")


def _course(run: StageContext[RunSettings], data: StageData) -> dict[str, Any]:
    course = course_settings(asdict(run.settings)) | {
        "precision": asdict(run.precision),
        "puzzles": data.split.train.content_hash(),
    }
    if run.to_prepare is None:
        course["the model that it starts from"] = fingerprint(run.parent)
    return json.loads(json.dumps(course))
