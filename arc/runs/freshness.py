"""Whether an artifact is still what its settings and its parents make."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arc.models.manifests import absolute_reference, read_manifest
from arc.models.prepared_base import check_base
from arc.runs.artifacts import Stage, find_changed_file, find_damage, fingerprint, read_manifest_or_nothing
from arc.runs.model_files import find_model_problem
from arc.runs.settings import RunSettings, course_settings, default_course

# Settings that later versions no longer have, with their defaults: records from before them still hold these.
REMOVED_SETTINGS = {"task_augmentation": 0, "lora_bias": "none", "use_vllm": False}


def made_from(folder: Path | str, of: Path) -> dict[str, str]:
    """The manifest's entry of an artifact's parent: {name: fingerprint}.

    Args:
        folder: the parent. A parent in the same output folder is named without its path, so that both can be moved.
        of: the artifact.
    """
    beside = Path(folder).is_dir() and Path(folder).resolve().parent == of.resolve().parent
    return {Path(folder).name if beside else absolute_reference(folder): fingerprint(folder)}


def find_outdated(folder: Path) -> str | None:
    """The first artifact of a chain whose parent was replaced after it was made, in words; None if there is none.

    Follows the manifests from a folder to its parents. A parent that no longer exists counts as unchanged.
    """
    manifest = read_manifest(folder)
    for name, recorded in manifest.get("made_from", {}).items():
        parent = folder.parent / name  # an absolute name stays what it is
        if not parent.is_dir():
            continue
        if fingerprint(parent) != recorded:
            script = manifest.get("script", "the script that made it")
            return (
                f"{folder} was made from another {name} than the one that is there now: run {script} again, as it was "
                "run, with --overwrite"
            )
        earlier = find_outdated(parent)
        if earlier:
            return earlier
    return None


def changed_settings(
    recorded: dict[str, Any], settings: RunSettings, precision: dict[str, Any], data: str | None
) -> list[str]:
    """The settings that decide the weights and have changed since an adapter was trained, as `name (was X, is Y)`.

    Args:
        recorded: the adapter's manifest.
        settings: of this run.
        precision: engine, dtype and load_in_4bit where the user has set them; those that are not set are not compared.
        data: fingerprint of the puzzles; None if they are not available.
    """
    before = course_settings(recorded.get("settings", {}))
    if recorded.get("settings"):  # an earlier version without a setting did what is the default now
        before = default_course(type(settings)) | before
    now = course_settings(json.loads(json.dumps(asdict(settings))))
    pairs = {name: (before[name], now[name]) for name in now if name in before}
    if recorded.get("precision"):
        pairs |= {name: (recorded["precision"][name], value) for name, value in precision.items()}
    changed = [f"{name} (was {_short(a)}, is {_short(b)})" for name, (a, b) in pairs.items() if a != b]
    changed += changed_removed(before, now)
    if data is not None and recorded.get("data_fingerprint", data) != data and not changed:
        extra = recorded.get("settings", {}).get("extra_dataset_dirs", [])
        if extra != settings.extra_dataset_dirs:
            named = [" ".join(folders) or "not set" for folders in (extra, settings.extra_dataset_dirs)]
            changed.append("extra_dataset_dirs (was {}, is {})".format(*named))
        else:  # settings that choose other puzzles are in the list already
            changed.append(f"the puzzles in {', '.join([settings.dataset_dir, *extra])}")
    return changed


def changed_removed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings of a record that no longer exist and were not at their default, as `name (was X, ...)`.

    Args:
        before: the recorded settings.
        now: those of this run.
    """
    return [
        f"{name} (was {_short(before[name])}, this setting was removed)"
        for name, default in REMOVED_SETTINGS.items()
        if name not in now and before.get(name, default) != default
    ]


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value).lower()


def find_parent(stage: Stage, settings: RunSettings, without_prepared: bool = False) -> Path | str:
    """The model that a stage starts from: a folder, or the hub name of a base model. Writes nothing.

    Args:
        stage: the stage.
        settings: of this run.
        without_prepared: ignore the prepared base, because it will be made again. Stage 1 starts from the prepared base
            if it exists, else from the base model.

    Raises:
        FileNotFoundError: there is no such model, or the parent stage has not run.
        ValueError: the model is quantised already, damaged or outdated.
    """
    output = Path(settings.output_dir)
    if stage.parent == "prepared":
        prepared = stage.prepared(settings)
        if prepared.exists() and not without_prepared:
            print(f"{prepared} is there: used")
            return prepared
        parent: Path | str = settings.base_model or ""
    else:
        parent = settings.base_model or stage.default_parent(settings)
        if settings.base_model is None and not Path(parent).exists():
            raise FileNotFoundError(
                f"{parent} is not there: {stage.script} starts from the merged model of {stage.parent_script}. Run "
                f"`python {stage.parent_script} --output_dir {output}` first, or name a model with --base_model"
            )
    if not Path(parent).is_dir():
        check_base(parent)
        return str(parent)
    parent = Path(parent)
    again = f"; run {stage.parent_script} again as it was run, with --overwrite: only what is damaged is made anew"
    made_here = read_manifest_or_nothing(parent)
    if made_here.get("files"):
        problem = find_damage(parent)
        outdated = None if problem else find_outdated(parent)
        if problem or outdated:
            raise ValueError((f"{parent} is damaged: {problem}" if problem else str(outdated)) + again)
    check_base(parent)
    if not made_here.get("files"):
        problem = find_model_problem(parent)
        if problem:
            raise ValueError(f"{parent} is no complete model: {problem}")
    return parent


def stale_base(prepared: Path, settings: RunSettings) -> str | None:
    """Why a prepared base does not fit the settings, in words; None if it fits."""
    manifest = read_manifest(prepared)
    if not manifest:
        return None
    base, full_vocab = manifest.get("base_model"), manifest.get("settings", {}).get("full_vocab", settings.full_vocab)
    other = (
        f"{prepared} was prepared from {base} with full_vocab {str(full_vocab).lower()}, asked for is "
        f"{settings.base_model} with full_vocab {str(settings.full_vocab).lower()}: use those flags, another "
        "--output_dir, or --overwrite, which moves it aside and prepares it anew"
    )
    if full_vocab != settings.full_vocab:
        return other
    if settings.base_model is not None and Path(settings.base_model).is_dir():
        table = manifest.get("base_files")
        changed = find_changed_file(Path(settings.base_model), table) if table else None
        if changed and str(settings.base_model) == base:
            return (
                f"{prepared} was prepared from {base} as it was then ({changed}): bring that back, or --overwrite, "
                "which moves it aside and prepares it anew"
            )
        return other if changed else None
    return other if base is not None and base != str(settings.base_model) else None
