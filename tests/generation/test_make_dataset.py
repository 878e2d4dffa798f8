"""demo/make_dataset.py: what it writes, that it does so again, and that it is careful with what is there."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from arc.generation.changed_outputs import generate_changed
from arc.generation.dataset_files import HEADER
from arc.generation.families import FAMILIES, generate
from arc.generation.operations import OPERATIONS
from arc.generation.processes import CHUNK
from arc.generation.programs import generate_programs
from arc.generation.rearc import from_rearc
from arc.puzzles import splits
from arc.puzzles.dataset import ArcDataset, Holdout
from base_finetune import Settings
from demo import make_dataset
from tests.helpers import run

Rows = list[list[int]]
# SHA-256 of the files that earlier versions generated, one after the other.
GOLDEN = {"families": "b12ab28e2b053f01", "programs": "3af1876c76ae4a77", "changed": "bca9895b804216a5"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# The dataset's files


def test_the_dataset_depends_on_the_settings_alone(tmp_path):
    flags = ["--examples", 20, "--seed", 7]
    for name, hash_seed in (("a", "1"), ("b", "2")):
        run("demo/make_dataset.py", "--out", tmp_path / name, *flags, fresh=True, PYTHONHASHSEED=hash_seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    names = {path.stem.rpartition("-")[0] for path in (tmp_path / "a").glob("*.json")}
    assert names == set(FAMILIES)
    assert len(names) >= 10
    run("demo/make_dataset.py", "--out", tmp_path / "c", "--examples", 20, "--seed", 8)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_what_is_generated_stays_the_same_to_the_byte(tmp_path):
    """Whoever generated a dataset with an earlier version gets the same one again."""
    (tmp_path / "families").mkdir()
    commands = {
        "families": ["--examples", "5"],
        "programs": ["--programs", "100", "--workers", "1"],
        "changed": [
            "--changed_from", str(tmp_path / "families"), "--sizes", "2", "--share", "1", "--workers", "1",
            "--holdout_examples", "4",
        ],
    }  # fmt: skip
    for name, flags in commands.items():
        assert make_dataset.main(["--out", str(tmp_path / name), *flags]) == 0
        files = sorted(contents(tmp_path / name).items())
        if name == "changed":
            files = files[:-1]  # rules.txt names the dataset's hash, which is none of the generator's business
        digest = hashlib.sha256(b"".join(content for _, content in files)).hexdigest()
        assert digest[:16] == GOLDEN[name], name


def test_a_task_stays_what_it_is_when_more_is_asked_for():
    few = generate(["gravity", "recolour"], tasks_per_family=1, examples=10, max_side=5, seed=3)
    many = generate(["crop", "recolour", "gravity"], tasks_per_family=3, examples=25, max_side=5, seed=3)
    for name, (parameters, pairs) in few.items():
        assert many[name][0] == parameters
        assert many[name][1][:10] == pairs


def test_a_family_gives_no_more_tasks_than_it_has_rules(tmp_path):
    printed = run(
        "demo/make_dataset.py", "--out", tmp_path / "d", "--families", "flip", "--tasks_per_family", 5, "--examples", 9
    )
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["flip-0.json", "flip-1.json", "rules.txt"]
    assert "flip has only 2 different rules" in printed


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
        (out / "rules.txt").write_text(f"{HEADER}\n../data {'0' * 64} {{}}\n")
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
    tasks, left_out = from_rearc(rearc, max_side=30, min_pairs=1)
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
    tasks = generate_programs(80, examples=7, max_side=8, seed=3, workers=1)
    assert 76 <= len(tasks) <= 80 and {name.rpartition("-")[0] for name in tasks} == {"program"}
    assert len({json.dumps(parameters) for parameters, _ in tasks.values()}) == len(tasks)
    for parameters, pairs in tasks.values():
        assert {"scene", "operations"} <= parameters.keys() and len(pairs) == 7
        assert len({json.dumps(pair["input"]) for pair in pairs}) == 7
        for pair in pairs:
            assert pair["input"] != pair["output"]
            for grid in pair.values():
                assert 1 <= len(grid) <= 8 and 1 <= len(grid[0]) <= 8
    more = generate_programs(90, examples=7, max_side=8, seed=3, workers=1)
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
    assert made["all"] == made["two"] and len(made["all"]) > CHUNK, "two processes draw"
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
    tasks, counts = generate_changed(tmp_path / "official", share=1, max_side=9, seed=2, workers=1, holdout_examples=2)
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
