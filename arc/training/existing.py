"""What a stage has written already, and whether these settings would write the same: adapter, merge, checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arc.models.manifests import absolute_reference, read_manifest
from arc.puzzles.files import write_atomically
from arc.puzzles.splits import load_split
from arc.runs.artifacts import existing, find_damage, fingerprint, read_manifest_or_nothing
from arc.runs.checkpoints import complete_checkpoints
from arc.runs.freshness import REMOVED_SETTINGS, changed_settings, find_outdated, stale_base
from arc.runs.settings import RunSettings, course_settings, default_course
from arc.training.data import StageData
from arc.training.stage import StageContext

COURSE = "course.json"  # beside the checkpoints: what decides the course of their training


def is_trained(run: StageContext[RunSettings]) -> bool:
    """Whether the adapter exists and is what these settings make.

    If an artifact is damaged or outdated, --overwrite sets `run.to_move`; without it ValueError is raised.
    """
    settings, prepared = run.settings, run.stage.prepared(run.settings)
    if run.stage.parent == "prepared" and prepared.exists():
        damage = find_damage(prepared)
        problem = f"{prepared} is damaged: {damage}" if damage else stale_base(prepared, settings)
        if problem and not settings.overwrite:
            raise ValueError(problem + ("; --overwrite moves it aside and prepares it anew" if damage else ""))
        if problem:
            run.to_move = existing([run.merged, run.work, run.lora, prepared])
            return False
    if not run.lora.exists():
        if run.merged.exists() and not settings.overwrite:
            raise ValueError(
                f"{run.merged} is there without {run.lora}: bring that back, or use another --output_dir; "
                "--overwrite trains the adapter again"
            )
        return False  # trained again, from its last checkpoint if there is one; the merge may still fit it then
    damage = find_damage(run.lora, "adapter")
    problem = f"is damaged: {damage}" if damage else _adapter_outdated(run)
    if problem and not settings.overwrite:
        raise ValueError(f"{run.lora} {problem}; --overwrite moves it aside (nothing is deleted) and makes it anew")
    if problem:
        print(f"{run.lora} {problem}: it will be moved aside")
        # The checkpoints and the merge of a damaged adapter are still good: it is made again from the last checkpoint.
        run.to_move = [run.lora] if damage else existing([run.merged, run.work, run.lora])
    return not problem


def _adapter_outdated(run: StageContext[RunSettings]) -> str | None:
    # Why the adapter is not what this run would train, in words; None if it is.
    settings, recorded = run.settings, read_manifest(run.lora)
    if not recorded.get("files"):  # made elsewhere: there is nothing to compare with
        return None
    named = settings.base_model if run.stage.parent != "prepared" else None
    parent = Path(named) if named else run.stage.default_parent(settings)
    before = recorded.get("made_from", {})
    if parent.is_dir() and fingerprint(parent) not in before.values():
        return f"was trained from another model than the one that is in {parent} now"
    if not parent.exists() and named:
        if absolute_reference(parent) not in before and str(parent.resolve()) not in before:
            return f"was trained from {', '.join(before)}, not from {parent}"
    earlier = find_outdated(run.lora)
    if earlier:
        return f"rests on something that has changed ({earlier})"
    flags = {"engine": settings.engine, "dtype": settings.dtype, "load_in_4bit": settings.load_in_4bit}
    asked = {name: value for name, value in asdict(run.precision).items() if flags[name] not in ("auto", None)}
    data = None
    missing = [folder for folder in settings.extra_dataset_dirs if not Path(folder).is_dir()]
    if missing and settings.extra_dataset_dirs != recorded.get("settings", {}).get("extra_dataset_dirs", []):
        raise FileNotFoundError(f"--extra_dataset_dirs: {missing[0]}: no such folder")
    if missing:  # as with a dataset that is gone: what was made of it is still good
        print(f"note: {missing[0]} is gone, so that the puzzles that {run.lora} was trained on are not compared")
    elif Path(settings.dataset_dir).is_dir():
        data = load_split(settings, quiet=True).train.content_hash()
    changed = changed_settings(recorded, settings, asked, data)
    return f"was trained with other settings: {', '.join(changed)}" if changed else None


def is_merged(run: StageContext[RunSettings]) -> bool:
    """Whether the merge exists and is that of this adapter onto the base that is asked for.

    If it is damaged or outdated, ValueError is raised, unless --overwrite is set.
    """
    if not run.merged.exists():
        return False
    damage, recorded = find_damage(run.merged), read_manifest_or_nothing(run.merged)
    problem = f"is damaged: {damage}" if damage else None
    if not problem and (outdated := find_outdated(run.merged)):
        problem = f"is outdated: {outdated}"
    if not problem and "merged_onto" in recorded:
        four_bit = recorded.get("precision", {}).get("load_in_4bit", False)
        onto = "quantised" if run.settings.merge_base == "quantised" and four_bit else "16-bit"
        if recorded["merged_onto"] != onto:
            was = recorded.get("merge_base")
            problem = f"was merged with --merge_base {was}, asked for is {run.settings.merge_base}"
    if problem and not run.settings.overwrite:
        raise ValueError(f"{run.merged} {problem}; --overwrite moves it aside and merges again")
    if problem:
        print(f"{run.merged} {problem}: it is moved aside")
    return not problem


def where_the_parent_is(run: StageContext[RunSettings]) -> Path | str:
    """The base that the adapter was trained on; raises FileNotFoundError if it is not there.

    A whole output folder may have been moved since the base's path was written.
    """
    if run.starts_from is not None:
        return run.starts_from
    for name, recorded in read_manifest(run.lora).get("made_from", {}).items():
        folder = run.lora.parent / name
        if folder.is_dir() and fingerprint(folder) == recorded:
            return folder
    from peft import PeftConfig

    named = PeftConfig.from_pretrained(str(run.lora)).base_model_name_or_path
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise FileNotFoundError(f"{run.lora} was trained on {named}, which is not there: bring it back to merge")
    return named


def check_course(run: StageContext[RunSettings], data: StageData) -> None:
    """Raise ValueError for checkpoints of other settings or data; with --overwrite, add them to `run.to_move`."""
    path = run.work / COURSE
    if run.work in run.to_move or not path.is_file() or not complete_checkpoints(run.work, quiet=True):
        return
    try:
        # An earlier version without a setting did what is the default now.
        before = default_course(type(run.settings)) | json.loads(path.read_text(encoding="utf-8"))
        course = REMOVED_SETTINGS | _course(run, data)
        changed = sorted(name for name in course if name in before and before[name] != course[name])
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
