"""The files of a generated dataset: what they hold, and a folder that appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RULES_FILE = "rules.txt"  # not .json: readers of the folder take every .json file for a task
HEADER = "# Made by demo/make_dataset.py, which replaces this folder only while it holds nothing else."


def render(
    tasks: Mapping[str, tuple[dict[str, Any], Any]],
    listing: str = RULES_FILE,
    header: Sequence[str] = (HEADER, "# file, sha256, parameters of the rule"),
) -> dict[str, bytes]:
    """The files of a dataset by name. The last one, `listing`, lists the others with checksum and parameters."""
    files = {f"{name}.json": json.dumps(pairs, separators=(",", ":")).encode() for name, (_, pairs) in tasks.items()}
    lines = [
        f"{file} {hashlib.sha256(content).hexdigest()} {json.dumps(parameters)}"
        for (file, content), (parameters, _) in zip(files.items(), tasks.values(), strict=True)
    ]
    files[listing] = "\n".join([*header, *lines, ""]).encode()
    return files


def is_ours(folder: Path) -> bool:
    """Whether a folder holds exactly the files of an earlier run: none added, none edited."""
    rules = folder / RULES_FILE
    if not rules.is_file():
        return False
    lines = rules.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0] != HEADER:
        return False
    listed = dict(line.split(" ", 2)[:2] for line in lines if line.count(" ") >= 2 and not line.startswith("#"))
    names = {path.name for path in folder.iterdir()}
    return names == {RULES_FILE, *listed} and all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in listed.items()
    )


def write_folder(files: dict[str, bytes], out: Path, replace: bool = True) -> bool:
    """Write the files as a folder that appears complete or not at all.

    Args:
        files: contents by name.
        out: the folder. An earlier one is replaced if this program wrote all its files.
        replace: False: never replace files.

    Returns:
        False if `out` holds these files already.

    Raises:
        FileExistsError: `out` is a file, or holds files that must not be replaced.
    """
    out = out.resolve()  # a link to a folder is replaced where it points
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: expected a folder; choose another --out")
    present = out.is_dir() and any(out.iterdir())
    if present:
        # Compare names first: this may be any folder, so read no file unless all names agree.
        if {path.name for path in out.iterdir()} == set(files) and all(
            (out / name).is_file() and (out / name).read_bytes() == content for name, content in files.items()
        ):
            return False
        if not replace:
            raise FileExistsError(f"{out} holds other files than would be written: choose another --out")
        if not is_ours(out):
            raise FileExistsError(
                f"{out} holds files that this program did not write (or that were edited): choose another --out"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.{os.getpid()}.incomplete")
    beside.mkdir()
    try:
        for name, content in files.items():
            (beside / name).write_bytes(content)
        if present:  # only files whose checksums were just compared
            for path in out.iterdir():
                path.unlink()
        beside.replace(out)  # works on a missing folder and on an empty one
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True
