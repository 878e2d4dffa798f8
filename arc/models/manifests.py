"""Saved folders: the manifest, a JSON file that says how the folder was made, and the mode of the files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact, or an empty dict if it has none; ValueError if it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} cannot be read (it holds a {type(manifest).__name__})")
    for name in ("files", "made_from", "settings", "precision", "check"):
        if not isinstance(manifest.get(name, {}), dict):
            raise ValueError(f"{path} cannot be read ({name} is no object)")
    for name, entry in manifest.get("files", {}).items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "mtime_ns", "sha256"}:
            raise ValueError(f"{path} cannot be read (its entry of {name})")
    return manifest


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of an artifact."""
    text = json.dumps(manifest, indent=2, sort_keys=True, default=str, allow_nan=False)
    (Path(folder) / MANIFEST).write_text(text + "\n", encoding="utf-8")


def apply_umask(path: str | Path) -> None:
    """Give a file, or all files of a folder, mode 0666 without the umask: safetensors' 0600 hides them from others."""
    umask = os.umask(0)  # the only way to read it
    os.umask(umask)
    for file in [Path(path)] if Path(path).is_file() else Path(path).rglob("*"):
        if file.is_file():
            with contextlib.suppress(PermissionError):  # a file system without modes
                file.chmod(0o666 & ~umask)


def absolute_reference(model: str | Path) -> str:
    """A model's folder by its absolute path, so that what names it loads from anywhere; a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)
