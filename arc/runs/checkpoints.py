"""Checkpoints: marked as complete when they have reached the disk, listed, checked and deleted.

`guard.guard` writes them. A checkpoint without its mark was cut off and is never used.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from arc.models.manifests import apply_umask
from arc.puzzles.files import flush, write_atomically

MARKER = "complete.json"  # in a checkpoint: the size in bytes of each of its files
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(arguments: Any, state: Any) -> Path:
    """The folder that a trainer writes its checkpoint of the present step into."""
    return Path(arguments.output_dir) / f"checkpoint-{state.global_step}"


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to the disk, then write the marker file, which has the size of each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, f"{MARKER}.tmp"))
    apply_umask(folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    write_atomically(folder / MARKER, json.dumps(sizes, indent=1) + "\n")
    flush(folder.parent)


def complete_checkpoints(folder: str | Path, quiet: bool = False) -> list[Path]:
    """The complete checkpoints of a folder, newest first.

    A checkpoint is complete if its marker exists and every file in it has the recorded size. The others are named in
    one printed note, unless `quiet`.
    """
    paths = {int(m[1]): p for p in Path(folder).glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(p.name))}
    whole = {step: path for step, path in paths.items() if _is_whole(path)}
    partial = [paths[step].name for step in sorted(paths.keys() - whole.keys())]
    if partial and not quiet:
        are = "are" if len(partial) > 1 else "is"
        print(f"note: {', '.join(partial)} {are} not whole (killed while it was written or deleted): not used")
    return [whole[step] for step in sorted(whole, reverse=True)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # missing, cut off, or not a table of sizes
        return False


def refuse_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files contain more than tensors and plain values.

    transformers refuses those too. This check comes before a model is loaded, and its message is one sentence.

    Raises:
        ValueError: one of the files would run code when it is loaded, or cannot be read.
    """
    import pickle

    import numpy as np
    import torch

    # What numpy's random state is made of; transformers allows it too.
    allowed = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    for path in (*sorted(checkpoint.glob("*.pt")), *sorted(checkpoint.glob("*.pth"))):
        try:
            with torch.serialization.safe_globals(allowed):
                torch.load(path, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} holds more than tensors and plain values, or is no checkpoint's file, and is not loaded "
                f"({str(error).strip().splitlines()[0][:120]}): move {checkpoint} away"
            ) from None


def delete_older(folder: Path, keep: int | None = None) -> None:
    """Delete checkpoints that are older than the newest complete one.

    Args:
        folder: of the checkpoints.
        keep: complete checkpoints to keep. None: all; only incomplete ones are deleted.
    """
    kept = complete_checkpoints(folder, quiet=True)[:keep]
    steps = {path: int(name[1]) for path in folder.glob("checkpoint-*") if (name := CHECKPOINT.fullmatch(path.name))}
    for path, step in steps.items():
        if kept and path not in kept and step < steps[kept[0]]:
            (path / MARKER).unlink(missing_ok=True)  # first: what is left of it, if this is interrupted, is not whole
            shutil.rmtree(path, ignore_errors=True)
