"""The demo's data and base model: reproducible, right by an independent computation, and careful with what is there."""

import json
import os
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arc.generation import families as make_dataset
from arc.generation.programs import OPERATIONS
from arc.puzzles import splits
from arc.puzzles.dataset import ArcDataset, Holdout
from base_finetune import Settings
from demo import make_base

ROOT = Path(__file__).resolve().parents[2]
Rows = list[list[int]]


def run(script: str, *flags: object, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "demo" / script), *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# The verifier: every rule again, cell by cell on plain lists, from its parameters as rules.txt gives them.


def solve_flip(g: Rows, axis: str) -> Rows:
    return [row[::-1] for row in g] if axis == "left-right" else g[::-1]


def solve_rotate(g: Rows, degrees: int) -> Rows:
    for _ in range(degrees // 90):  # counter-clockwise: the last column becomes the first row
        g = [[row[c] for row in g] for c in reversed(range(len(g[0])))]
    return g


def solve_transpose(g: Rows, diagonal: str) -> Rows:
    h, w = len(g), len(g[0])
    if diagonal == "main":
        return [[g[r][c] for r in range(h)] for c in range(w)]
    return [[g[h - 1 - r][w - 1 - c] for r in range(h)] for c in range(w)]


def solve_recolour(g: Rows, map: list[int]) -> Rows:  # noqa: A002 - the parameter's name in the file
    return [[map[v] for v in row] for row in g]


def solve_swap_colours(g: Rows, colours: list[int]) -> Rows:
    low, high = colours
    return [[high if v == low else low if v == high else v for v in row] for row in g]


def solve_keep_colour(g: Rows, colour: int) -> Rows:
    return [[v if v == colour else 0 for v in row] for row in g]


def solve_translate(g: Rows, down: int, right: int, wrap: bool) -> Rows:
    h, w = len(g), len(g[0])
    out = [[0] * w for _ in range(h)]
    for r in range(h):
        for c in range(w):
            to_r, to_c = r + down, c + right
            if wrap:
                to_r, to_c = to_r % h, to_c % w
            if 0 <= to_r < h and 0 <= to_c < w:
                out[to_r][to_c] = g[r][c]
    return out


def turned(g: Rows, direction: str) -> Rows:
    """Turn a grid so that `direction` points right; `turned_back` undoes it. By rotations, unlike the generator."""
    return solve_rotate(g, {"right": 0, "down": 90, "left": 180, "up": 270}[direction])


def turned_back(g: Rows, direction: str) -> Rows:
    return solve_rotate(g, {"right": 0, "down": 270, "left": 180, "up": 90}[direction])


def solve_gravity(g: Rows, direction: str) -> Rows:
    lines = [[v for v in row if v] for row in turned(g, direction)]
    width = len(turned(g, direction)[0])
    return turned_back([[0] * (width - len(line)) + line for line in lines], direction)


def solve_rays(g: Rows, direction: str) -> Rows:
    lines = [list(row) for row in turned(g, direction)]
    for row in lines:
        for c in range(1, len(row)):
            row[c] = row[c] or row[c - 1]
    return turned_back(lines, direction)


def solve_mirror_extend(g: Rows, direction: str) -> Rows:
    if direction == "right":
        return [row + row[::-1] for row in g]
    if direction == "left":
        return [row[::-1] + row for row in g]
    return g + g[::-1] if direction == "down" else g[::-1] + g


def solve_repeat(g: Rows, direction: str) -> Rows:
    return [row + row for row in g] if direction == "right" else g + g


def solve_scale(g: Rows, rows: int, columns: int) -> Rows:
    return [[v for v in row for _ in range(columns)] for row in g for _ in range(rows)]


def solve_symmetrise(g: Rows, direction: str) -> Rows:
    lines = [list(row) for row in turned(g, direction)]
    for row in lines:
        for c in range(len(row) // 2):
            row[len(row) - 1 - c] = row[c]
    return turned_back(lines, direction)


def solve_border(g: Rows, colour: int) -> Rows:
    h, w = len(g), len(g[0])
    return [[colour if r in (0, h - 1) or c in (0, w - 1) else g[r][c] for c in range(w)] for r in range(h)]


def solve_crop(g: Rows, background: int) -> Rows:
    def trimmed(lines: Rows) -> Rows:
        while all(v == background for v in lines[0]):
            lines = lines[1:]
        while all(v == background for v in lines[-1]):
            lines = lines[:-1]
        return lines

    return solve_transpose(trimmed(solve_transpose(trimmed(g), "main")), "main")


def solve_count(g: Rows, colour: int) -> Rows:
    return [[colour for row in g for v in row if v == colour]]


def solve_combine(g: Rows, operation: str, line: int, colour: int) -> Rows:
    half = len(g[0]) // 2
    assert all(row[half] == line for row in g)
    wanted = {"and": (2,), "or": (1, 2), "xor": (1,)}[operation]
    return [[colour if (row[c] > 0) + (row[half + 1 + c] > 0) in wanted else 0 for c in range(half)] for row in g]


def test_the_verifier_itself_on_a_grid_solved_by_hand():
    grid = [[0, 1, 0], [2, 0, 3]]
    assert solve_rotate(grid, 90) == [[0, 3], [1, 0], [0, 2]]
    assert solve_transpose(grid, "other") == [[3, 0], [0, 1], [2, 0]]
    assert solve_gravity(grid, "down") == [[0, 0, 0], [2, 1, 3]]
    assert solve_gravity(grid, "up") == [[2, 1, 3], [0, 0, 0]]
    assert solve_gravity(grid, "left") == [[1, 0, 0], [2, 3, 0]]
    assert solve_rays(grid, "up") == [[2, 1, 3], [2, 0, 3]]
    assert solve_rays(grid, "right") == [[0, 1, 1], [2, 2, 3]]
    assert solve_symmetrise(grid, "right") == [[0, 1, 0], [2, 0, 2]]
    assert solve_symmetrise(grid, "left") == [[0, 1, 0], [3, 0, 3]]
    assert solve_translate(grid, 1, -1, wrap=False) == [[0, 0, 0], [1, 0, 0]]
    assert solve_translate(grid, 1, -1, wrap=True) == [[0, 3, 2], [1, 0, 0]]
    assert solve_crop([[7, 7, 7], [7, 1, 7], [7, 7, 7]], 7) == [[1]]
    assert solve_scale([[1, 2]], 2, 1) == [[1, 2], [1, 2]]
    assert solve_combine([[1, 5, 2], [0, 5, 4]], "xor", 5, 8) == [[0], [8]]


@pytest.mark.parametrize("max_side", [3, 5, 12])
@pytest.mark.parametrize("family", make_dataset.FAMILIES)
def test_every_output_follows_from_its_rule(family, max_side):
    solve = globals()[f"solve_{family.replace('-', '_')}"]
    tasks = make_dataset.generate([family], tasks_per_family=10, examples=60, max_side=max_side, seed=1)
    for name, (parameters, pairs) in tasks.items():
        parameters = json.loads(json.dumps(parameters))  # as a reader of rules.txt gets them
        assert len(pairs) == 60
        assert len({json.dumps(pair["input"]) for pair in pairs}) == 60, f"{name} repeats an input"
        for pair in pairs:
            assert pair["output"] == solve(pair["input"], **parameters), (name, parameters, pair["input"])
            assert pair["output"] != pair["input"], f"{name}: an example that shows nothing"
            for grid in pair.values():
                assert 1 <= len(grid) <= max_side
                assert 1 <= len(grid[0]) <= max_side
                assert {len(row) for row in grid} == {len(grid[0])}
                assert all(type(v) is int and 0 <= v <= 9 for row in grid for v in row)
    rules = [json.dumps(parameters, sort_keys=True) for parameters, _ in tasks.values()]
    assert len(set(rules)) == len(rules), "two tasks of one rule"


# ---------------------------------------------------------------------------------------------------------------------
# The dataset's files


def test_the_dataset_depends_on_the_settings_alone(tmp_path):
    flags = ["--examples", 20, "--seed", 7]
    for name, hash_seed in (("a", "1"), ("b", "2")):
        done = run("make_dataset.py", "--out", tmp_path / name, *flags, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    names = {path.stem.rpartition("-")[0] for path in (tmp_path / "a").glob("*.json")}
    assert names == set(make_dataset.FAMILIES)
    assert len(names) >= 10
    assert run("make_dataset.py", "--out", tmp_path / "c", "--examples", 20, "--seed", 8).returncode == 0
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_task_stays_what_it_is_when_more_is_asked_for():
    few = make_dataset.generate(["gravity", "recolour"], tasks_per_family=1, examples=10, max_side=5, seed=3)
    many = make_dataset.generate(["crop", "recolour", "gravity"], tasks_per_family=3, examples=25, max_side=5, seed=3)
    for name, (parameters, pairs) in few.items():
        assert many[name][0] == parameters
        assert many[name][1][:10] == pairs


def test_a_family_gives_no_more_tasks_than_it_has_rules(tmp_path):
    done = run(
        "make_dataset.py", "--out", tmp_path / "d", "--families", "flip", "--tasks_per_family", 5, "--examples", 9
    )
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["flip-0.json", "flip-1.json", "rules.txt"]
    assert "flip has only 2 different rules" in done.stdout


def test_its_own_folder_is_kept_or_replaced(tmp_path):
    out = tmp_path / "new" / "data"
    flags = ["--out", str(out), "--families", "flip", "rotate", "--examples"]
    assert make_dataset.main([*flags, "9"]) == 0
    before = contents(out)
    written = (out / "flip-0.json").stat().st_mtime_ns
    assert make_dataset.main([*flags, "9"]) == 0
    assert (out / "flip-0.json").stat().st_mtime_ns == written, "unchanged files are not written again"
    assert make_dataset.main([*flags, "12"]) == 0
    assert contents(out).keys() == before.keys()
    assert contents(out) != before
    assert [path.name for path in out.parent.iterdir()] == ["data"], "nothing temporary stays"


@pytest.mark.parametrize(
    "what", ["other files", "one file added", "one file edited", "one file missing", "a file", "forged"]
)
def test_a_folder_of_someone_else_is_left_alone(tmp_path, capsys, what):
    out = tmp_path / "data"
    flags = ["--out", str(out), "--families", "flip", "--examples"]
    if what == "a file":
        out.write_text("mine")
    elif what == "other files":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif what == "forged":
        out.mkdir()
        (out / "rules.txt").write_text(f"{make_dataset.HEADER}\n../data {'0' * 64} {{}}\n")
    else:
        assert make_dataset.main([*flags, "9"]) == 0
        if what == "one file added":
            (out / "mine.json").write_text("[]")
        elif what == "one file edited":
            (out / "flip-0.json").write_text("[]")
        else:
            (out / "flip-0.json").unlink()
    before = out.read_bytes() if out.is_file() else contents(out)
    capsys.readouterr()
    assert make_dataset.main([*flags, "10"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(out) in error
    assert error.count("\n") == 1
    assert before == (out.read_bytes() if out.is_file() else contents(out))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--families", "flip", "flop"], "flop"),
        (["--examples", "0"], "--examples"),
        (["--tasks_per_family", "0"], "--tasks_per_family"),
        (["--max_side", "2"], "--max_side"),
        (["--max_side", "31"], "--max_side"),
        (["--seed", "-1"], "--seed"),
        (["--families", "repeat", "--max_side", "3", "--examples", "5000"], "--examples"),
    ],
)
def test_bad_settings_of_the_dataset(tmp_path, capsys, flags, expected):
    assert make_dataset.main(["--out", str(tmp_path / "d"), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Taken from re-arc


def side(*sizes: tuple[int, int], start: int = 0) -> list[dict[str, Rows]]:
    """Pairs of an input of each size and a 1 x 1 output, no two inputs alike."""
    return [
        {"input": [[(start + i) % 10] * w for _ in range(h)], "output": [[(start + i) // 10]]}
        for i, (h, w) in enumerate(sizes)
    ]


@pytest.fixture
def rearc(tmp_path: Path) -> Path:
    """Two tasks of 8 small pairs or more, one of which also has large and repeated ones, and one of large pairs."""
    tasks = {
        "aa": side(*[(3, 3)] * 8),
        "b_b": [
            *side(*[(2, 5)] * 8),
            {"input": [[1] * 5] * 2, "output": [[9]]},  # the second of its input
            *side((11, 3), (3, 11)),
            {"input": [[7]], "output": [[7] * 11]},
            {"input": [[7]], "output": [[7] * 10]},
        ],
        "large": side(*[(3, 3)] * 6, *[(12, 3)] * 4),
    }
    folder = tmp_path / "re_arc"
    (folder / "tasks").mkdir(parents=True)
    for name, pairs in tasks.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(pairs))
    (folder / "tasks" / "not_named.json").write_text("[")
    (folder / "metadata.json").write_text(json.dumps({name: {"n_verified": 1} for name in tasks}))
    return folder


def test_pairs_are_taken_from_rearc(rearc, tmp_path, capsys):
    out = tmp_path / "dataset"
    flags = ["--from_rearc", str(rearc), "--out", str(out), "--max_side", "10"]
    assert make_dataset.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed == f"{out}: 2 tasks, 17 of their 21 pairs\n  left out: 1 tasks with fewer than 7 pairs: large (6)\n"
    assert sorted(path.name for path in out.iterdir()) == ["aa.json", "b_b.json", "rearc.txt"]
    all_pairs = json.loads((rearc / "tasks" / "b_b.json").read_text())
    assert json.loads((out / "b_b.json").read_text()) == [*all_pairs[:8], all_pairs[-1]]
    assert json.loads((out / "aa.json").read_text()) == json.loads((rearc / "tasks" / "aa.json").read_text())
    ds = ArcDataset.load_from_local_json(out)
    assert {ds.task_of(key) for key in ds.keys} == {"aa", "b-b"}
    assert make_dataset.main(flags) == 0
    assert "there already, unchanged" in capsys.readouterr().out


def test_all_sides_and_few_pairs_on_demand(rearc, tmp_path):
    tasks, left_out = make_dataset.from_rearc(rearc, max_side=30, min_pairs=1)
    assert [len(pairs) for _, pairs in tasks.values()] == [8, 11, 10]
    assert not left_out
    assert tasks["b_b"][0] == {"pairs": 11, "of": 13}


@pytest.mark.parametrize("what", ["other settings", "other files", "a generated dataset"])
def test_what_is_there_is_not_replaced_by_pairs_of_rearc(rearc, tmp_path, capsys, what):
    out = tmp_path / "dataset"
    flags = ["--from_rearc", str(rearc), "--out", str(out)]
    if what == "other settings":
        assert make_dataset.main([*flags, "--max_side", "10"]) == 0
    elif what == "other files":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        assert make_dataset.main(["--out", str(out), "--families", "flip", "--examples", "9"]) == 0
    before = contents(out)
    capsys.readouterr()
    assert make_dataset.main(flags) == 2
    assert capsys.readouterr().err == f"error: {out} holds other files than would be written: choose another --out\n"
    assert contents(out) == before


def test_pairs_of_rearc_are_not_replaced_by_generated_ones(rearc, tmp_path, capsys):
    out = tmp_path / "dataset"
    assert make_dataset.main(["--from_rearc", str(rearc), "--out", str(out)]) == 0
    before = contents(out)
    assert make_dataset.main(["--out", str(out), "--families", "flip", "--examples", "9"]) == 2
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        (None, ["--max_side", "0"], "--max_side is 0: expected 1 to 30"),
        (None, ["--max_side", "31"], "--max_side is 31"),
        (None, ["--min_pairs", "0"], "--min_pairs is 0"),
        (None, ["--examples", "9", "--seed", "1"], "--examples --seed: of no use with --from_rearc"),
        (None, ["--max_side", "2"], "none of 3 tasks has 7 pairs with sides up to 2, the most are 0"),
        ("metadata.json", [], "metadata.json"),
        ("tasks/aa.json", [], "aa.json"),
        ("a bad cell", [], "aa.json, pair 1, input, row 1"),
        ("a puzzle", [], "aa.json: found a puzzle"),
    ],
)
def test_bad_settings_and_files_of_rearc(rearc, tmp_path, capsys, change, flags, expected):
    puzzle = {"train": side((3, 3)), "test": side((3, 3))}
    if change in ("a bad cell", "a puzzle"):
        text = json.dumps(puzzle if change == "a puzzle" else [{"input": [[10]], "output": [[1]]}])
        (rearc / "tasks" / "aa.json").write_text(text)
    elif change is not None:
        (rearc / change).unlink()
    assert make_dataset.main(["--from_rearc", str(rearc), "--out", str(tmp_path / "d"), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--min_pairs", "3"], "--min_pairs: of no use without --programs, --changed_from and --from_rearc"),
        (["--programs", "3", "--families", "flip"], "--families: of no use with --programs"),
        (["--programs", "3", "--from_rearc", "re_arc"], "--programs and --from_rearc: expected one of them"),
        (["--programs", "3", "--changed_from", "dataset"], "--programs and --changed_from: expected one of them"),
        (["--programs", "3", "--share", "0.5"], "--share: of no use with --programs"),
        (["--changed_from", "dataset", "--examples", "7"], "--examples: of no use with --changed_from"),
        (["--holdout_tasks", "2"], "--holdout_tasks: of no use without"),
        (["--programs", "0", "--examples", "99"], "--programs is 0: expected a whole number from 1; --examples is 99"),
        (["--programs", "3", "--workers", "0"], "--workers is 0: expected a whole number from 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, expected):
    assert make_dataset.main(["--out", str(tmp_path / "d"), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def test_programs_are_drawn_alike_by_any_number_of_processes(tmp_path):
    flags = ["--programs", "60", "--max_side", "8"]
    for workers in ("1", "2"):
        out = tmp_path / workers
        assert make_dataset.main(["--out", str(out), *flags, "--workers", workers]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert make_dataset.main(["--out", str(tmp_path / "3"), *flags, "--workers", "1", "--seed", "7"]) == 0
    assert contents(tmp_path / "1") != contents(tmp_path / "3")


def test_each_program_is_another_one_and_makes_one_puzzle():
    tasks = make_dataset.generate_programs(80, examples=7, max_side=8, seed=3, workers=1)
    assert 76 <= len(tasks) <= 80 and {name.rpartition("-")[0] for name in tasks} == {"program"}
    assert len({json.dumps(parameters) for parameters, _ in tasks.values()}) == len(tasks)
    for parameters, pairs in tasks.values():
        assert {"scene", "operations"} <= parameters.keys() and len(pairs) == 7
        assert len({json.dumps(pair["input"]) for pair in pairs}) == 7
        for pair in pairs:
            assert pair["input"] != pair["output"]
            for grid in pair.values():
                assert 1 <= len(grid) <= 8 and 1 <= len(grid[0]) <= 8
    more = make_dataset.generate_programs(90, examples=7, max_side=8, seed=3, workers=1)
    assert {name: more[name] for name in tasks} == tasks, "a task stays what it is when more is asked for"


# ---------------------------------------------------------------------------------------------------------------------
# Changed outputs

HELD = {"sizes": [2], "holdout_examples": 20, "holdout_tasks": 6, "holdout_seed": 3}
HELD_FLAGS = [
    word for name, value in HELD.items() for word in (f"--{name}", str(*value) if name == "sizes" else f"{value}")
]


def held_split(folder: Path) -> Holdout:
    return splits.load_split(Settings(dataset_dir=str(folder), **HELD), quiet=True)


def grids(puzzle: dict, side: str) -> list[Rows]:
    return [np.asarray(pair[side]).tolist() for part in ("train", "test") for pair in puzzle[part]]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in which a puzzle to train on has the input of a held-out test, and one that of a demonstration."""
    folder = tmp_path_factory.mktemp("changed") / "course"
    assert make_dataset.main(["--out", str(folder), "--examples", "12", "--max_side", "6", "--seed", "1"]) == 0
    split = held_split(folder)
    for number, part in enumerate(("test", "train")):
        # How examples form puzzles and what is held out depends on names and numbers, not on the grids.
        hidden = split.unseen.challenge[min(split.unseen.challenge)][part][0]["input"].tolist()
        path = folder / f"{split.train.task_of(sorted(split.train.challenge)[-number])}.json"
        pairs = json.loads(path.read_text())
        pairs[0]["input"] = hidden
        path.write_text(json.dumps(pairs))
    return folder


def test_outputs_are_changed_of_what_a_stage_trains_on_alone(course, tmp_path, capsys):
    out = tmp_path / "changed"
    flags = ["--changed_from", str(course), "--out", str(out), "--share", "1", "--max_side", "6", *HELD_FLAGS]
    assert make_dataset.main(flags) == 0
    printed = capsys.readouterr().out
    assert make_dataset.main(flags) == 0
    assert "there already, unchanged" in capsys.readouterr().out
    split = held_split(course)
    held = [puzzle for part in (split.seen, split.unseen) for puzzle in part.challenge.values()]
    hidden = [grid for puzzle in held for grid in grids(puzzle, "input")]
    assert len(split.seen.challenge) == 20 and len(split.unseen.challenge) == 6 * 4
    overlapping = {p for p, v in split.train.challenge.items() if any(g in hidden for g in grids(v, "input"))}
    assert overlapping, "else this shows nothing"
    written = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    looked_at, unfit = len(split.train.challenge), len(split.train.challenge) - len(overlapping) - len(written)
    assert unfit < 0.4 * looked_at
    assert printed == (
        f"{out}: {len(written)} puzzles with changed outputs, of {looked_at} looked at "
        f"({looked_at} to train on, --share 1.0)\n  left out: {unfit} without an operation that fits, "
        f"{len(overlapping)} with an input of a held-out puzzle\n"
    )
    for name, puzzle in written.items():
        prefix, _, of = name.partition("-")
        assert prefix == "changed" and of in split.train.challenge.keys() - overlapping
        before = {"train": split.train.challenge[of]["train"], "test": split.train.challenge[of]["test"]}
        assert grids(puzzle, "input") == grids(before, "input")
        outputs = [np.asarray(pair["output"]).tolist() for pair in before["train"]]
        outputs += [grid.tolist() for grid in split.train.solutions[of]]
        new = grids(puzzle, "output")
        assert len(new) == 3 and sum(a == b for a, b in zip(new, outputs, strict=True)) <= 1
        assert any(grid != new[0] for grid in new)
        for grid in new:
            assert 1 <= len(grid) <= 6 and 1 <= len(grid[0]) <= 6 and all(0 <= v <= 9 for row in grid for v in row)
    ds = ArcDataset.load_from_local_json(out, sizes=HELD["sizes"])
    assert ds.challenge.keys() == written.keys() == ds.solutions.keys(), "each file is one puzzle, its test a test"


def test_changes_depend_on_the_puzzle_alone(course, tmp_path):
    flags = ["--changed_from", str(course), *HELD_FLAGS]
    made = {}
    for name, more in {
        "half": [], "all": ["--share", "1", "--workers", "1"], "two": ["--share", "1", "--workers", "2"],
        "seed": ["--seed", "7"], "tasks": ["--holdout_tasks", "9"],
    }.items():  # fmt: skip
        assert make_dataset.main([*flags, "--out", str(tmp_path / name), *more]) == 0
        made[name] = contents(tmp_path / name)
        del made[name]["rules.txt"]
    assert made["all"] == made["two"] and len(made["all"]) > make_dataset.PROGRAMS_A_CALL, "two processes draw"
    assert made["half"] != made["seed"]
    assert made["half"].items() < made["all"].items(), "a larger share adds some"
    assert 0.35 < len(made["half"]) / len(made["all"]) < 0.65
    both = made["half"].keys() & made["tasks"].keys()
    assert len(both) > 20 and all(made["half"][name] == made["tasks"][name] for name in both)
    # Of other settings, and all of it written by this program: replaced.
    assert make_dataset.main([*flags, "--out", str(tmp_path / "half"), "--share", "1"]) == 0
    assert contents(tmp_path / "half") == contents(tmp_path / "all")


def test_official_puzzles_are_changed_with_what_solutions_they_have(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "official").mkdir()
    for number in range(12):
        pairs = [{side: rng.integers(0, 10, (3, 4)).tolist() for side in ("input", "output")} for _ in range(5)]
        tests = pairs[3:] if number % 2 else [{"input": pair["input"]} for pair in pairs[3:]]
        (tmp_path / "official" / f"p{number}.json").write_text(json.dumps({"train": pairs[:3], "test": tests}))
    tasks, counts = make_dataset.generate_changed(
        tmp_path / "official", share=1, max_side=9, seed=2, workers=1, holdout_examples=2
    )
    assert counts["train"] == 10 and len(tasks) + counts["unfit"] == 10 and len(tasks) >= 6
    for name, (parameters, puzzle) in tasks.items():
        before = json.loads((tmp_path / "official" / f"{name.removeprefix('changed-')}.json").read_text())
        assert parameters["operation"] in OPERATIONS
        assert [pair.keys() for pair in puzzle["test"]] == [pair.keys() for pair in before["test"]]
        assert grids(puzzle, "input") == grids(before, "input")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--share", "0"], "--share is 0.0: expected a share above 0, up to 1"),
        (["--share", "1.5", "--max_side", "31"], "--share is 1.5: expected a share above 0, up to 1; --max_side is 31"),
        (["--share", "nan"], "--share is nan"),
        (["--seed", "-1", "--workers", "0"], "--workers is 0: expected a whole number from 1; --seed is -1"),
        (["--holdout_seed", "-1"], "--holdout_seed is -1: expected a whole number from 0"),
        (["--holdout_tasks", "99"], "--changed_from: 99 tasks to hold out, expected 0 to"),
        (["--holdout_examples", "9999"], "--changed_from: 9,999 examples to hold out"),
        (["--sizes", "0"], "--changed_from: sizes is (0,)"),
        (["--grid_sizes", "3"], "--changed_from: grid_sizes is (3,)"),
        (["--max_side", "1"], "no puzzle to write of"),
        (["--changed_from", "nowhere"], "--changed_from: nowhere: no such folder"),
        (["--out", "course"], "--out and --changed_from are both course: expected another --out"),
    ],
)
def test_bad_settings_of_changed_outputs(course, tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    Path("course").symlink_to(course)
    before = contents(course)
    command = ["--changed_from", "course", "--out", "d", "--workers", "1", *HELD_FLAGS, *flags]
    assert make_dataset.main(command) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not Path("d").exists() and contents(course) == before


# ---------------------------------------------------------------------------------------------------------------------
# The base model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "base"
    done = run("make_base.py", "--out", out, hash_seed="1")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_the_base_loads_and_is_like_llama(base, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (512, 64)
    assert model.config.num_attention_heads == 4
    assert model.config.num_key_value_heads == 2
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.pad_token_id is None
    named = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == named
    ids = torch.tensor([tokenizer("I12\n34")["input_ids"]])
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= ids.shape[1] + 3


def test_special_tokens(tokenizer):
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token is None
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens(list(range(496, 512))) == make_base.SPECIAL_TOKENS
    for token in make_base.SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert {"<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"} < set(make_base.SPECIAL_TOKENS)


def test_the_tokenizer_adds_bos_and_gives_the_text_back(tokenizer):
    text = "I120\n003\n+/-=O5\n<|eot_id|>Ünïcode, Turn  the grid!\r\n\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_digits_merge_in_groups_of_up_to_three(tokenizer):
    vocabulary = tokenizer.get_vocab()
    lengths = Counter(len(token) for token in vocabulary if token.isascii() and token.isdigit())
    assert lengths[1] == 10
    assert lengths[2] >= 50
    assert lengths[3] >= 10
    assert set(lengths) == {1, 2, 3}
    assert tokenizer.tokenize("0000000") == ["000", "000", "0"]
    # The marks of the text format do not survive as tokens of their own, as with the real vocabulary.
    assert len(tokenizer.tokenize("+/-=")) < 4


@pytest.mark.parametrize("character", [*string.ascii_letters, *string.digits, *"!?.:,;*+/-=", "\n"])
def test_a_character_alone_is_one_token_of_its_own(tokenizer, character):
    (token,) = tokenizer(character, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([token]) == character


def test_the_base_is_reproducible(base, tmp_path):
    done = run("make_base.py", "--out", tmp_path / "again", hash_seed="2")
    assert done.returncode == 0, done.stderr
    assert contents(base) == contents(tmp_path / "again")


def test_the_rotary_base_is_chosen_and_kept(base, tmp_path, capsys):
    out = tmp_path / "b"
    assert make_base.main(["--out", str(out), "--rope_theta", "10000"]) == 0
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert [config["rope_parameters"].pop("rope_theta") for config in configs] == [500000.0, 10000.0]
    assert configs[0] == configs[1]
    assert make_base.main(["--out", str(out)]) == 2  # there with another one
    record = out / "make_base.json"
    made = json.loads(record.read_text())
    del made["settings"]["rope_theta"]  # a record from before there was a choice: it was Llama 3's
    record.write_text(json.dumps(made))
    capsys.readouterr()
    assert make_base.main(["--out", str(out)]) == 0 and "there already" in capsys.readouterr().out
    assert make_base.main(["--out", str(out), "--rope_theta", "10000"]) == 2


def test_the_base_is_not_made_twice_or_overwritten(base, tmp_path, capsys):
    before = contents(base)
    assert make_base.main(["--out", str(base)]) == 0
    assert "there already" in capsys.readouterr().out
    assert make_base.main(["--out", str(base), "--seed", "5"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert contents(base) == before
    (tmp_path / "mine.txt").write_text("mine")
    assert make_base.main(["--out", str(tmp_path)]) == 2
    assert "did not write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab", "200"], "--vocab is 200: expected 272"),
        (["--vocab", "100000"], "the training text gives no more"),
        (["--hidden", "60"], "--hidden is 60: expected a multiple of twice --heads, 8"),
        (["--layers", "0"], "--layers"),
        (["--seed", "-1"], "--seed"),
        (["--rope_theta", "1"], "--rope_theta is 1: expected a number above 1"),
    ],
)
def test_bad_settings_of_the_base(tmp_path, capsys, flags, expected):
    assert make_base.main(["--out", str(tmp_path / "b"), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["make_dataset.py", "make_base.py"])
def test_help_needs_no_heavy_library(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'demo' / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
