"""Make a dataset in the course format: one JSON file a task, each a list of input/output pairs of one rule.

    python demo/make_dataset.py --out demo_dataset
    python demo/make_dataset.py --out demo_dataset --tasks_per_family 4 --max_side 6 --families flip gravity
    python demo/make_dataset.py --programs 20000 --out programs --examples 7
    python demo/make_dataset.py --changed_from dataset --out changed --holdout_examples 800 --holdout_tasks 40
    python demo/make_dataset.py --from_rearc re_arc --out dataset --max_side 10

Without one of the three flags below it generates small puzzles from families of rules. It reads nothing and writes
OUT/FAMILY-NUMBER.json, one a task, and OUT/rules.txt: each file's checksum and its rule's parameters. The files depend
on the settings alone. A task depends only on its family, its number and the settings of its examples: more tasks, more
examples or other families leave it as it is.

--programs: each rule is a program put together at random (arc/generation/programs.py). No two tasks have the same
program. Writes OUT/program-NUMBER.json. A rule with fewer examples than asked for is left out.

--changed_from: changes all outputs of puzzles by one random operation each. It loads a dataset, holds out what a stage
with the same --sizes, --grid_sizes, --dataset_seed and --holdout_... holds out, and takes a --share of the puzzles that
are left. Writes OUT/changed-PUZZLE.json, each a puzzle {"train", "test"}. A puzzle that has the same input as a
held-out one is not written. (The stage itself leaves out a held-out test pair in other colours or another orientation.)
The result depends on the puzzle's name, its outputs, --seed and --max_side.

--from_rearc: reads what re-arc has generated (metadata.json, tasks/*.json) and writes OUT/TASK.json: the pairs with no
side above --max_side, each input once. OUT/rearc.txt lists each file's checksum and counts. Nothing is replaced.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arc.generation.changed_outputs import SPLIT, generate_changed
from arc.generation.dataset_files import HEADER, render, write_folder
from arc.generation.families import FAMILIES, generate
from arc.generation.programs import generate_programs
from arc.generation.rearc import REARC_FILE, REARC_HEADER, from_rearc
from arc.puzzles.grids import MAX_SIDE

# Flags of each way to make a dataset, with their defaults; None: the stages' default, or one process a core.
FAMILY_FLAGS = {"tasks_per_family": 2, "examples": 120, "max_side": 5, "seed": 42, "families": list(FAMILIES)}
FLAGS: dict[str, dict[str, Any]] = {
    "programs": {"examples": 7, "max_side": 10, "seed": 42, "workers": None},
    "changed_from": {"share": 0.5, "max_side": 10, "seed": 42, "workers": None, **dict.fromkeys(SPLIT)},
    "from_rearc": {"max_side": MAX_SIDE, "min_pairs": 7},
}


def parse_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were given, by name, and --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_dataset"), help="folder to write (demo_dataset)")
    add("--tasks_per_family", type=int, help="tasks of each family (2)")
    add("--examples", type=int, help="input/output pairs of each task (120; of a program 7)")
    add("--max_side", type=int, help=f"largest side of a grid (5; of programs and changes 10; of re-arc's {MAX_SIDE})")
    add("--seed", type=int, help="of everything that is drawn (42)")
    add("--families", nargs="+", metavar="FAMILY", help=", ".join(FAMILIES))
    add("--programs", type=int, metavar="N", help="draw this many programs instead of tasks of families")
    add("--changed_from", type=Path, metavar="DIR", help="change outputs of this dataset's puzzles")
    add("--share", type=float, help="share of the puzzles to train on that are changed (0.5)")
    for name in SPLIT:
        several = {"nargs": "+"} if name in ("sizes", "grid_sizes") else {}
        add(f"--{name}", type=int, help="as given to the stages: it decides what is held out", **several)
    add("--workers", type=int, help="processes that draw programs or changes (one a core)")
    add("--from_rearc", type=Path, metavar="DIR", help="take the pairs of re-arc instead of generating any")
    add("--min_pairs", type=int, help="leave out tasks of re-arc with fewer pairs (7)")
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the dataset that the flags describe; return the exit code."""
    given = parse_flags(argv)
    out = given.pop("out")
    try:
        chosen = [name for name in FLAGS if name in given]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in chosen)}: expected one of them")
        mode = chosen[0] if chosen else None
        defaults = FLAGS[mode] if mode else FAMILY_FLAGS
        useless = [f"--{name}" for name in given if name not in {*defaults, mode}]
        if useless:
            when = f"with --{mode}" if mode else "without --programs, --changed_from and --from_rearc"
            raise ValueError(f"{' '.join(useless)}: of no use {when}")
        settings: dict[str, Any] = {**defaults, **given}
        if mode == "from_rearc":
            take_from_rearc(out, settings.pop("from_rearc"), settings)
        elif mode == "changed_from":
            settings = {name: value for name, value in settings.items() if value is not None}
            change_puzzles(out, settings.pop("changed_from"), settings)
        elif mode == "programs":
            tasks = generate_programs(**settings)
            written = write_folder(render(tasks), out)
            say(f"{out}: {len(tasks)} tasks of different programs, {settings['examples']} examples each", written)
        else:
            generate_families(out, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def say(line: str, written: bool) -> None:
    """Print what a folder holds, and whether it held that before."""
    print(line + ("" if written else "; there already, unchanged"))


def generate_families(out: Path, settings: dict[str, Any]) -> None:
    """Write tasks of families; print how many."""
    tasks, wanted = generate(**settings), settings["tasks_per_family"]
    written = write_folder(render(tasks), out)
    families = list(dict.fromkeys(settings["families"]))
    say(f"{out}: {len(tasks)} tasks of {len(families)} families, {settings['examples']} examples each", written)
    for name in families:
        count = sum(task.rpartition("-")[0] == name for task in tasks)
        if count < wanted:
            print(f"  {name} has only {count} different rules, so {count} tasks instead of {wanted}")


def change_puzzles(out: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write puzzles with changed outputs; print how many, and how many were left out."""
    if out.resolve() == folder.resolve():  # which this program may have written and would replace
        raise ValueError(f"--out and --changed_from are both {folder}: expected another --out")
    tasks, source = generate_changed(folder, **settings)
    drawn = {name: settings[name] for name in ("share", "max_side", "seed")}
    header = (HEADER, f"# {json.dumps({**drawn, **source})}", "# file, sha256, operation on the outputs")
    written = write_folder(render(tasks, header=header), out)
    say(
        f"{out}: {len(tasks):,} puzzles with changed outputs, of {source['looked_at']:,} looked at "
        f"({source['train']:,} to train on, --share {settings['share']})",
        written,
    )
    print(
        f"  left out: {source['unfit']:,} without an operation that fits, {source['heldout']:,} with an input of "
        "a held-out puzzle"
    )


def take_from_rearc(out: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write re-arc's pairs; print how many, and which tasks were left out."""
    tasks, left_out = from_rearc(folder, **settings)
    header = (REARC_HEADER, f"# {json.dumps(settings)}", "# file, sha256, pairs taken")
    written = write_folder(render(tasks, REARC_FILE, header), out, replace=False)
    taken, total = (sum(counts[name] for counts, _ in tasks.values()) for name in ("pairs", "of"))
    say(f"{out}: {len(tasks)} tasks, {taken:,} of their {total:,} pairs", written)
    if left_out:
        named = ", ".join(f"{name} ({pairs})" for name, pairs in left_out.items())
        print(f"  left out: {len(left_out)} tasks with fewer than {settings['min_pairs']} pairs: {named}")


if __name__ == "__main__":
    sys.exit(main())
