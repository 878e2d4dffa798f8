"""What keeps a run's work when something goes wrong: checkpoints, stop signals, NaN, full disks, too little memory.

Before the work, `find_shortages` compares what a run needs at least with what is free. During the training, `guard`
saves by time and on a stop signal, lets no checkpoint with a weight that is no number be written, and marks a
checkpoint as complete when it has reached the disk. Around all of it, `machine_errors` turns trouble of the machine
into one message that names what to lower and what is safe.
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
    """Flush a checkpoint's files to the disk, then write the marker that names each with its size, in one move."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, f"{MARKER}.tmp"))
    apply_umask(folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    write_atomically(folder / MARKER, json.dumps(sizes, indent=1) + "\n")
    flush(folder.parent)


def complete_checkpoints(folder: str | Path, quiet: bool = False) -> list[Path]:
    """The checkpoints of a folder that are whole, newest first.

    A checkpoint is whole if its marker is there and every file that it names has the size that it had. The others are
    named in one printed note, unless `quiet`.
    """
    found = {int(m[1]): p for p in Path(folder).glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(p.name))}
    whole = {step: path for step, path in found.items() if _is_whole(path)}
    partial = [found[step].name for step in sorted(found.keys() - whole.keys())]
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
    """Refuse a checkpoint whose files hold anything but tensors and plain values.

    transformers does not unpickle other things either; this says so before a model is loaded, and in one sentence.

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
    """Delete checkpoints that are older than the newest whole one.

    Args:
        folder: of the checkpoints.
        keep: whole ones to keep. None: all, only what is left of others goes, by a run that was killed while it wrote
            or deleted one.
    """
    kept = complete_checkpoints(folder, quiet=True)[:keep]
    steps = {path: int(name[1]) for path in folder.glob("checkpoint-*") if (name := CHECKPOINT.fullmatch(path.name))}
    for path, step in steps.items():
        if kept and path not in kept and step < steps[kept[0]]:
            (path / MARKER).unlink(missing_ok=True)  # first: what is left of it, if this is interrupted, is not whole
            shutil.rmtree(path, ignore_errors=True)
