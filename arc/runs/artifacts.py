"""Artifacts: the folders that stages write (`-prepared`, `-lora`, `-merged`), complete once they have their name.

A folder is written beside its place, flushed to the disk and renamed. Its manifest.json records how it was made, from
which parents, and the sha256 of each file. A stage can therefore tell whether a folder is damaged, before it skips the
work or builds on it. Whether it is up to date is decided in arc/runs/freshness.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arc.models.manifests import MANIFEST, read_manifest, write_manifest
from arc.puzzles.files import flush
from arc.runs.model_files import find_model_problem
from arc.runs.settings import RunSettings

INCOMPLETE = ".incomplete"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "numpy",
)
# Files that make a model. Other files of a folder (logs, pictures, notes, other formats) are about it.
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")
# adapter_config.json names the base by its path, which differs from place to place; the weights show the rest of it.
ABOUT_THE_MODEL = (MANIFEST, "probe.safetensors", "make_base.json", "adapter_config.json")


@dataclass(frozen=True)
class Stage:
    """Names of a stage and of the artifact that it starts from.

    Args:
        name: "Base", "Final" or "Final-RL".
        parent: the artifact that it starts from: "prepared", or the name of an earlier stage.
        script: the stage's file, for messages.
        parent_script: the file that makes the parent, for messages.
    """

    name: str
    parent: str
    script: str
    parent_script: str

    def lora(self, settings: RunSettings) -> Path:
        """Folder of the adapter."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-lora"

    def merged(self, settings: RunSettings) -> Path:
        """Folder of the merged model."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-merged"

    def checkpoints(self, settings: RunSettings) -> Path:
        """Folder of the checkpoints and logs of the training, beside the artifacts."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-checkpoints"

    def prepared(self, settings: RunSettings) -> Path:
        """Folder of the prepared base."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-prepared"

    def default_parent(self, settings: RunSettings) -> Path:
        """Folder that the stage starts from if no other is named."""
        name = "prepared" if self.parent == "prepared" else f"{self.parent}-merged"
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that gets its name only when it is complete.

    Yields:
        The folder to write into, under another name. If the block raises, it is deleted. If the process is killed, it
        stays, and the next run deletes it.

    Raises:
        FileExistsError: `path` exists; nothing is ever overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + INCOMPLETE)
    if beside.exists():  # what a killed run left
        shutil.rmtree(beside)
    beside.mkdir()
    try:
        yield beside
        _seal(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(path)
    flush(path.parent)


def _seal(folder: Path) -> None:
    # Every file and its hash go into the manifest; all of them reach the disk before the folder gets its name.
    manifest = read_manifest(folder)
    if manifest:
        write_manifest(folder, {**manifest, "files": file_table(folder)})
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def move_aside(path: Path) -> Path:
    """Rename a folder to `NAME.old-1`, or the next free number, and print so. Nothing is deleted."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"moved {path} aside: {aside}")
    return aside


def provenance(stage: str, script: str, settings: RunSettings, **more: Any) -> dict[str, Any]:
    """The manifest's entries of how an artifact was made: stage, script, settings, versions, time, and `more`."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"stage": stage, "script": script, "settings": asdict(settings), "versions": versions(), "made": now}
    return {**about, **more}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on; absent ones are left out."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def makes_the_model(name: str) -> bool:
    """Whether a file is part of the model, by its name relative to the folder."""
    return "/" not in name and name.endswith(MODEL_SUFFIXES) and name not in ABOUT_THE_MODEL


def file_table(folder: Path, *, model_only: bool = False) -> dict[str, dict[str, Any]]:
    """Size (bytes), modification time (ns) and sha256 of a folder's files, by relative name; without its manifest.

    Args:
        folder: any folder.
        model_only: only the files that make the model; for folders that are not ours.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    table = {}
    for path in sorted(p for p in files if not model_only or makes_the_model(p.relative_to(folder).as_posix())):
        state = path.stat()
        table[path.relative_to(folder).as_posix()] = {
            "bytes": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            "sha256": _sha256(path),
        }
    return table


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_changed_file(folder: Path, table: dict[str, dict[str, Any]]) -> str | None:
    """The first difference between a folder and the table of its files, in words; None if there is none.

    A file with the recorded size and time counts as the same. If only the time differs, as in a copy, it is hashed.
    """
    for name, recorded in table.items():
        path = folder / name
        try:
            state = path.stat()
        except OSError:
            return f"{name} is missing"
        if state.st_size != recorded["bytes"]:
            return f"{name} has {state.st_size:,} bytes, not {recorded['bytes']:,}"
        if state.st_mtime_ns != recorded["mtime_ns"] and _sha256(path) != recorded["sha256"]:
            return f"{name} is not the file that was written (its sha256 differs)"
    return None


def fingerprint(folder: str | Path) -> str:
    """A sha256 of the files of a model or adapter, which tells it from any other.

    Two folders with the same model have the same fingerprint. The fingerprint of a hub name is the sha256 of the name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return hashlib.sha256(str(folder).encode()).hexdigest()
    table = read_manifest(folder).get("files") or file_table(folder, model_only=True)
    parts = sorted((name, entry["sha256"]) for name, entry in table.items() if makes_the_model(name))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_damage(folder: Path, kind: str = "model") -> str | None:
    """The damage of an existing folder, in words; None if it is whole.

    Args:
        folder: an artifact, or a model or adapter that was made elsewhere.
        kind: "model" or "adapter": what it should be.
    """
    if not folder.is_dir():
        return "it is no folder"
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest.get("files"):
        # A changed log or picture is no damage to the model.
        return find_changed_file(folder, {n: e for n, e in manifest["files"].items() if n.endswith(MODEL_SUFFIXES)})
    problem = find_model_problem(folder, kind)
    if problem is None:
        print(f"note: {folder} has no {MANIFEST} with its files: made elsewhere; it was looked through and is used")
    return problem


def read_manifest_or_nothing(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty if there is none or it cannot be read."""
    with contextlib.suppress(ValueError):
        return read_manifest(folder)
    return {}


def existing(folders: Sequence[Path]) -> list[Path]:
    """Those of the folders that exist."""
    return [folder for folder in folders if folder.exists()]
