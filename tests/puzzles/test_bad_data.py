"""What bad data gets: an error of one or two lines that names file, pair and row and says what was expected."""

import json
import os
import time

import numpy as np
import pytest

from arc.puzzles import files
from arc.puzzles.dataset import ArcDataset

GOOD = {"input": [[1, 2], [3, 4]], "output": [[5]]}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")


def check(error, *words):
    text = str(error.value)
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    assert len(text.splitlines()) <= 2
    assert "expected" in text


def in_input(grid):
    return [GOOD, {"input": grid, "output": [[5]]}]


BAD_GRIDS = [
    # grid                          place and what was found
    ([[1, 2], [3]], ("row 2", "1 cells", "2 as in row 1")),
    ([[1], [2, 3]], ("row 2", "2 cells")),
    ([[1, 2], [3, 10]], ("row 2", "10")),
    ([[1, -1]], ("row 1", "-1")),
    ([[True, 1]], ("row 1", "True")),
    ([[1.0, 1]], ("row 1", "1.0")),
    ([[1, None]], ("row 1", "None")),
    ([["1"]], ("row 1", "'1'")),
    ([[float("nan")]], ("row 1", "nan")),
    ([[float("inf")]], ("row 1", "inf")),
    ([[10**30]], ("row 1", "more than 64 bits")),
    ([[[1]]], ("row 1", "[1]")),
    ([], ("0 rows", "1 to 30")),
    ([[]], ("row 1", "0 cells")),
    ([[1], []], ("row 2", "0 cells")),
    ([[1]] * 31, ("31 rows", "1 to 30")),
    ([[1] * 31], ("row 1", "31 cells")),
    (5, ("found 5",)),
    (None, ("found None",)),
    ("12", ("'12'",)),
    ({"0": [1]}, ("found",)),
    ([1, 2], ("row 1", "found 1")),
    (["12"], ("row 1", "'12'")),
]


@pytest.mark.parametrize(("grid", "words"), BAD_GRIDS, ids=[str(i) for i in range(len(BAD_GRIDS))])
def test_bad_grids_in_each_kind_of_file(tmp_path, grid, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "t.json"
    file.write_text(json.dumps([GOOD, GOOD]))
    (folder / "z.json").write_text(json.dumps(in_input(grid)))
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(folder)
    check(error, "z.json", "pair 2", "input", *words)
    (folder / "z.json").write_text(json.dumps([GOOD, {"input": [[1]], "output": grid}]))
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(folder)
    check(error, "z.json", "pair 2", "output", *words)

    kaggle = tmp_path / "kaggle.json"
    kaggle.write_text(
        json.dumps({"abc": {"train": [GOOD, {"input": [[1]], "output": grid}], "test": [{"input": [[1]]}]}})
    )
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_json(kaggle)
    check(error, "kaggle.json", "abc", "train pair 2", "output", *words)
    kaggle.write_text(json.dumps({"abc": {"train": [GOOD], "test": [{"input": grid}]}}))
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_json(kaggle)
    check(error, "kaggle.json", "abc", "test pair 1", "input", *words)

    ds = ArcDataset({"abc": {"train": [GOOD], "test": [{"input": [[1]]}]}}, is_orig=True)
    (tmp_path / "s.json").write_text(json.dumps({"abc": [grid]}))
    with pytest.raises(ValueError) as error:
        ds.load_solutions(tmp_path / "s.json")
    check(error, "s.json", "abc", "solution 1", *words)


BAD_FILES = [
    # content                                         words
    (b"", ("not JSON", "line 1", "column 1")),
    (b"   \n", ("not JSON",)),
    (b'[{"input":[[1]],"output":[[1]]', ("not JSON", "line 1")),
    (b'[{"input":[[1]],\n"output":[[1 2]]}]', ("not JSON", "line 2, column 14")),
    (b'[{"input":[[1]],"output":[[1]]},]', ("not JSON",)),
    (b'[{"input":[[01]],"output":[[1]]}]', ("not JSON",)),
    (b'[{"in put":[[1]],"output":[[1]]}]', ("pair 1",)),
    (b'[{"input":[[1]],"output":[[1]]}]\xff', ("0xff", "UTF-8")),
    ('[{"input":[[1]],"output":[[1]]}]'.encode("utf-16"), ("UTF-8",)),
    (b"[" * 200_000, ("nested too deeply",)),
    (b'[{"input":[[' + b"[" * 5000 + b"]" * 5000 + b']],"output":[[1]]}]', ("nested too deeply",)),
    (b'[{"input":[[' + b"9" * 5000 + b']],"output":[[1]]}]', ("digits",)),
    (b"[]", ("found no pairs",)),
    (b"{}", ("found {}", "list of pairs")),
    (b"null", ("found None",)),
    (b"5", ("found 5",)),
    (b'"text"', ("'text'",)),
    (b"[5]", ("pair 1", "found 5")),
    (b"[[1]]", ("pair 1",)),
    (b'[{"input":[[1]]}]', ("pair 1", '"output"')),
    (b'[{"output":[[1]]}]', ("pair 1", "input")),
    (b'[{"input":[[1]],"input":[[2]],"output":[[1]]}]', ("duplicate", "'input'")),
    (b'{"train":[],"test":[]}', ("train", "no pairs")),
    (b'{"train":5,"test":[]}', ("train", "found 5")),
    (b'{"train":[{"input":[[1]],"output":[[1]]}],"test":[]}', ("test", "no pairs")),
    (b'{"train":[{"input":[[1]]}],"test":[{"input":[[1]]}]}', ("train pair 1", '"output"')),
    (
        b'{"train":[{"input":[[1]],"output":[[1]]}],"test":[{"input":[[1]],"output":[[1]]},{"input":[[1]]}]}',
        ("test pair 2", '"output"'),
    ),
    (b'{"abc":{"train":[],"test":[]}}', ("load_from_json",)),
]


@pytest.mark.parametrize(("content", "words"), BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))])
def test_bad_task_files(tmp_path, content, words):
    (tmp_path / "good.json").write_text(json.dumps([GOOD] * 7))
    (tmp_path / "odd.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, "odd.json", *words)


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD]).encode())
    assert len(ArcDataset.load_from_local_json(tmp_path, sizes=(1,))) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", ("found []",)),
        (b"{}", ("found {}",)),
        (b"{", ("line 1",)),
        (b'{"a":5}', ("puzzle a", "found 5")),
        (b'{"a":{"train":[]}}', ("puzzle a",)),
        (b'{"a_b":{"train":[{"input":[[1]],"output":[[1]]}],"test":[]}}', ("a_b", '"_"')),
        (b'{"a":{"train":[],"test":[]},"a":{"train":[],"test":[]}}', ("duplicate", "'a'")),
        (b'{"train":[],"test":[]}', ("found",)),
        (rb'{"\ud800":{"train":[{"input":[[1]],"output":[[1]]}],"test":[]}}', (r"puzzle '\ud800'", "expected text")),
        (b'{"' + b"a" * 5000 + b'":5}', ("puzzle 'aaaa", "found 5")),
        (b'{"a\\nb":5}', (r"puzzle 'a\nb'", "found 5")),
    ],
)
def test_bad_challenge_files(tmp_path, content, words):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_json(tmp_path / "c.json")
    check(error, "c.json", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"b": [[[1]]]}, ("1 puzzles", "such as a")),
        ({"a": [[[1]], [[2]]]}, ("puzzle a", "1 test inputs")),
        ({"a": []}, ("puzzle a", "1 test inputs")),
        ({"a": 5}, ("puzzle a", "found solutions 5")),
        ({"a": None}, ("1 puzzles", "such as a")),
        ([1], ("found [1]",)),
    ],
)
def test_bad_solution_files(tmp_path, content, words):
    (tmp_path / "s.json").write_text(json.dumps(content))
    ds = ArcDataset({"a": {"train": [GOOD], "test": [{"input": [[1]]}]}})
    with pytest.raises(ValueError) as error:
        ds.load_solutions(tmp_path / "s.json")
    check(error, "s.json", *words)


def test_places_without_files(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ArcDataset.load_from_local_json(tmp_path / "nowhere")
    check(error, "nowhere", "no such folder")
    with pytest.raises(FileNotFoundError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, str(tmp_path), "found no *.json")
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path / "one.json")
    check(error, "one.json", "is a file", "load_from_json")
    for load in (ArcDataset.load_from_json, ArcDataset({}).load_solutions):
        with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
            load(tmp_path / "nowhere.json")
        with pytest.raises(ValueError, match="cannot be read"):
            load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metadata.json: no such file"):
        ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[6], seed=0)
    with pytest.raises(FileNotFoundError, match="data"):
        ArcDataset.load_from_neoneye(tmp_path)


def test_links_and_folders_that_are_no_files(tmp_path):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, "loop.json", "cannot be read")
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path / "loop.json")
    check(error, "loop.json", "cannot be read")
    (tmp_path / "loop.json").unlink()
    (tmp_path / "gone.json").symlink_to(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="gone.json"):
        ArcDataset.load_from_local_json(tmp_path)
    (tmp_path / "gone.json").unlink()
    (tmp_path / "sub.json").mkdir()
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, "sub.json", "cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(tmp_path):
    (tmp_path / "secret.json").write_text("[]")
    (tmp_path / "secret.json").chmod(0)
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, "secret.json", "cannot be read")
    tmp_path.chmod(0)
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            ArcDataset.load_from_local_json(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_what_never_ends_or_is_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "large.json").write_bytes(b"[")
    os.truncate(tmp_path / "large.json", files.MAX_FILE_BYTES + 1)
    for name, words in (("pipe", "pipe"), ("zero", "device"), ("large", "100,000,001 bytes")):
        for load in (ArcDataset.load_from_json, ArcDataset({}).load_solutions):
            with pytest.raises(ValueError) as error:
                load(tmp_path / f"{name}.json")
            check(error, f"{name}.json", words)


def test_an_object_with_very_many_names_is_looked_through_quickly(tmp_path):
    names = ",".join(f'"{number}":0' for number in range(200_000))
    (tmp_path / "c.json").write_text(f'{{{names},"199999":0}}')
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="duplicate id '199999'"):
        ArcDataset.load_from_json(tmp_path / "c.json")
    assert time.perf_counter() - begin < 10


def test_task_names_that_are_no_file_names(tmp_path):
    (tmp_path / "tasks").mkdir()
    for name in ("", "..", "../x", "/x", "a/b", "\0", "\ud800", "x" * 300):
        (tmp_path / "metadata.json").write_text(json.dumps({name: {}}))
        with pytest.raises(ValueError) as error:
            ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[6], seed=0)
        check(error, "metadata.json", "task name")


def test_file_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"a\xff.json")
    (tmp_path / name).write_text(json.dumps([GOOD] * 7))
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path)
    check(error, str(tmp_path), r"'a\udcff.json'", "UTF-8")


def test_an_end_of_reply_that_is_empty_is_no_end():
    with pytest.raises(ValueError, match="reply_end is empty"):
        ArcDataset({}).decode("1", lines_sep="\n", reply_end="")


def test_two_files_of_one_name(tmp_path):
    for name in ("a_b.json", "a.b.json"):
        (tmp_path / name).write_text(json.dumps([GOOD] * 7))
    with pytest.raises(ValueError, match="duplicate id 'a-b'") as error:
        ArcDataset.load_from_local_json(tmp_path)
    assert "a_b.json" in str(error.value)
    assert "a.b.json" in str(error.value)
    (tmp_path / "a_b.json").rename(tmp_path / "x.json")
    (tmp_path / "x-000.json").write_text(json.dumps({"train": [GOOD], "test": [GOOD]}))
    with pytest.raises(ValueError, match="duplicate puzzle id 'x-000'"):
        ArcDataset.load_from_local_json(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 3}, ("3 puzzles", "maximum is 2")),
        ({"n": 0}, ("n is 0",)),
        ({"n": -1}, ("n is -1",)),
        ({"sizes": ()}, ("sizes",)),
        ({"sizes": (0,)}, ("sizes",)),
        ({"sizes": (14,)}, ("no task has the pairs", "14 and a test")),
        ({"grid_sizes": (3, 2)}, ("grid_sizes", "low <= high")),
        ({"grid_sizes": (0, 2)}, ("grid_sizes",)),
        ({"grid_sizes": (20, 30)}, ("within grid_sizes (20, 30)",)),
    ],
)
def test_settings_out_of_range(tmp_path, options, words):
    (tmp_path / "t.json").write_text(json.dumps([GOOD] * 14))
    assert len(ArcDataset.load_from_local_json(tmp_path)) == 2
    with pytest.raises(ValueError) as error:
        ArcDataset.load_from_local_json(tmp_path, **options)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1


def test_puzzles_from_python_are_checked_too():
    def build(grid):
        return ArcDataset({"a": {"train": [{"input": grid, "output": [[1]]}], "test": []}})

    for good in (
        [[1]],
        ((1, 2), (3, 4)),
        np.array([[9]], dtype=np.int8),
        np.ones((30, 30), dtype=np.int64),
        [np.array([1, 2]).tolist()],
    ):
        assert np.array_equal(build(good).challenge["a"]["train"][0]["input"], good)
    for bad in (
        np.ones((31, 1), dtype=int), np.ones((1, 0), dtype=int), np.ones(3, dtype=int), np.ones((1, 1, 1), dtype=int),
        np.ones((2, 2)), np.ones((2, 2), dtype=bool), np.array([[256]]), np.array([[-1]]), np.array([["1"]]),
        [[np.float64(1)]], [[np.bool_(True)]],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"puzzle a, train pair 1, input"):
            build(bad)
    for bad_id in ("a_b", "a.b", "", 5):
        with pytest.raises(ValueError, match="found the id"):
            ArcDataset({bad_id: {"train": [GOOD], "test": []}})
    with pytest.raises(ValueError, match="no puzzle 'b'"):
        ArcDataset({"a": {"train": [GOOD], "test": []}}, keys=["b_0"])
