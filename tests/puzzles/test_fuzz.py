"""Random input for the loader and the decoder: what comes out is a sound result, or an error that names the file.

    ARC_FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py -n 0

runs that many examples in all, new ones each time; without the variable 3,000, the same ones each time. SHARES says how
they are divided.
"""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.files import parse_json, parse_task_file, scan_pairs

EXAMPLES = int(os.environ.get("ARC_FUZZ_EXAMPLES", "3000"))
# Of all examples, the share of each test.
SHARES = {"bytes": 0.10, "damaged": 0.30, "values": 0.25, "any_text": 0.10, "near_grids": 0.25}
LONGEST_MESSAGE = 700  # characters; what a message shows of a value must not grow with the value


def fuzzed(name):
    """Hypothesis' settings for a test: its share of the examples."""
    return settings(
        max_examples=max(1, round(EXAMPLES * SHARES[name])),
        derandomize="ARC_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,  # two cores shared with other tests: a slow example is no failure
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARC_LOADER_CACHE", "off")
        yield


@contextlib.contextmanager
def folder():
    """A new folder, in memory where the machine has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def grid(rng, most=4):
    """Rows of cells."""
    return rng.integers(0, 10, size=rng.integers(1, most + 1, size=2)).tolist()


def pair(rng):
    return {"input": grid(rng), "output": grid(rng)}


def valid_documents(kind, rng):
    """A file's value of a kind, as the kind's loader takes it."""
    pairs = [pair(rng) for _ in range(rng.integers(2, 7))]
    official = {"train": pairs, "test": [pair(rng)]}
    if kind in ("pairs", "rearc"):
        return pairs
    if kind in ("official", "neoneye"):
        return official
    if kind == "challenges":
        return {"aa": official, "bb": {"train": pairs, "test": [{"input": grid(rng)}, {"input": grid(rng)}]}}
    if kind == "solutions":
        return {"aa": [grid(rng)], "bb": [grid(rng), grid(rng)], "other": []}
    return {"t": {"verified": True}, "u": {}}  # metadata


KINDS = ("pairs", "official", "challenges", "solutions", "rearc", "metadata", "neoneye")
SEEDS = range(4)
STYLES = ({"separators": (",", ":")}, {}, {"indent": 1})
GOOD = json.dumps([{"input": [[1, 2]], "output": [[3]]}] * 4).encode()
CHALLENGES = json.dumps(valid_documents("challenges", np.random.default_rng(0))).encode()


def load(kind, content, place):
    """Load a file of the kind as a user would; returns the file and the dataset."""
    if kind in ("pairs", "official"):
        file = place / "odd.json"
        file.write_bytes(content)
        (place / "good.json").write_bytes(GOOD)
        return file, lambda: ArcDataset.load_from_local_json(place, sizes=(1, 2))
    if kind in ("challenges", "solutions"):
        challenges = place / "challenges.json"
        file = place / f"{kind}.json"
        challenges.write_bytes(CHALLENGES)
        file.write_bytes(content)
        if kind == "challenges":
            return file, lambda: ArcDataset.load_from_json(file)
        return file, lambda: ArcDataset.load_from_json(challenges).load_solutions(file)
    if kind == "neoneye":
        file = place / "data" / "group" / "odd_v2.json"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        return file, lambda: ArcDataset.load_from_neoneye(place)
    (place / "tasks").mkdir()
    for name in ("t", "u"):
        (place / "tasks" / f"{name}.json").write_bytes(GOOD)
    (place / "metadata.json").write_text('{"t": {}, "u": {}}')
    file = place / "metadata.json" if kind == "metadata" else place / "tasks" / "u.json"
    file.write_bytes(content)
    return file, lambda: ArcDataset.load_from_rearc(place, n=1, sizes=[1], seed=0)


def check_loading(kind, content):
    """Loading gives a sound dataset or a short ValueError or FileNotFoundError that names the file."""
    with folder() as place:
        file, loading = load(kind, content, place)
        try:
            data = loading()
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            whole_folder = f"{place}: "  # what is wrong with no single file: too few pairs for a round, say
            assert str(file) in text or whole_folder in text or f"{place / 'tasks'}{os.sep}" in text, text
            assert len(text) < LONGEST_MESSAGE and len(text.splitlines()) <= 2, text
            assert type(error) in (ValueError, FileNotFoundError), repr(error)  # no codec's own errors
            return
    assert len(data.keys) and len(data.content_hash()) == 64
    for view in data:
        for shown in [*(g for demonstration in view["train"] for g in demonstration), view["test"], view["solution"]]:
            assert shown is None or is_grid(shown)


def is_grid(value):
    sides = min(value.shape), max(value.shape)
    return value.dtype == np.uint8 and value.ndim == 2 and 1 <= sides[0] <= sides[1] <= 30 and value.max() <= 9


def check_quick_scan(content):
    """What the quick scan of pairs takes is JSON, and the careful parser reads the same grids from it."""
    found = scan_pairs(content)
    if found is None:
        return
    value = parse_json(content, Path("odd.json"))
    assert list(map(set, value)) == [{"input", "output"}] * len(value)
    cells, heights, widths = found
    expected = [np.array(item[side]) for item in value for side in ("input", "output")]
    assert [(int(h), int(w)) for h, w in zip(heights, widths, strict=True)] == [e.shape for e in expected]
    assert cells.tolist() == np.concatenate([e.ravel() for e in expected]).tolist()


JSON_PIECES = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"0", b"9", b"10", b"-1", b"1.0", b"1e400", b"NaN", b"-Infinity",
    b"true", b"null", b'"input"', b'"output"', b'"train"', b'"test"', b" ", b"\n", b"\r", b"\t", b"\0", b"\xff",
    b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"\xd9\xa1", b"[[1]]", b'{"input":[[1]],"output":[[2]]}', b"1" * 400,
    b"[" * 1000, b"]" * 1000,
]  # fmt: skip


@fuzzed("bytes")
@given(st.sampled_from(KINDS), st.binary(max_size=60) | st.lists(st.sampled_from(JSON_PIECES)).map(b"".join))
def test_any_bytes_as_a_file_are_read_or_refused_by_name(kind, content):
    check_quick_scan(content)
    check_loading(kind, content)


@st.composite
def damaged_files(draw):
    """A kind and a valid file of it with a few bytes changed, cut, doubled, moved in from another file, or put in."""
    kind = draw(st.sampled_from(KINDS))
    style = draw(st.sampled_from(STYLES))
    content = json.dumps(valid_documents(kind, np.random.default_rng(draw(st.sampled_from(SEEDS)))), **style).encode()
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(("flip", "digit", "cut", "remove", "double", "splice", "insert")))
        at = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), at + draw(st.integers(0, 40)))
        if how == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif how == "digit":
            content = content[:at] + str(draw(st.integers(0, 9))).encode() + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "remove":
            content = content[:at] + content[end:]
        elif how == "double":
            content = content[:end] + content[at:]
        elif how == "splice":
            other = json.dumps(
                valid_documents(draw(st.sampled_from(KINDS)), np.random.default_rng(9)), **style
            ).encode()
            content = content[:at] + other[draw(st.integers(0, len(other))) :]
        else:
            content = content[:at] + draw(st.sampled_from(JSON_PIECES)) + content[at:]
    return kind, content


@fuzzed("damaged")
@given(damaged_files())
def test_damaged_files_are_read_or_refused_by_name(drawn):
    kind, content = drawn
    check_quick_scan(content)
    check_loading(kind, content)


RAW = "@raw@"  # replaced in the written file by text that json.dumps does not write
RAW_TEXTS = (
    "1e400", "-1e400", "9" * 5000, "-0", "0.0", "1E0", "NaN", "-Infinity", "[" * 990 + "]" * 990,
    "[" * 5000 + "]" * 5000, '{"input":' * 600 + "1" + "}" * 600, r'"\ud800"', r'"\u0000"', '{"a":1,"a":2}', "01", "",
    "[[1],[1]]", "[" + ",".join(["[1]"] * 31) + "]", "[[" + ",".join(["1"] * 31) + "]]", f'"{"x" * 5000}"',
)  # fmt: skip
NAMES = st.sampled_from(
    ["", "a_b", "a.b", "../x", "/", "x" * 300, "x" * 5000, "a\nb", "\0", "\ud800", "train", "input", "aa", "é"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(0, 12) | st.floats() | st.text(max_size=8) | st.just(RAW)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)


def places(value, depth=0):
    """Every place in a JSON value as (container, index or name), containers included."""
    for step in value if isinstance(value, dict) else range(len(value)):
        yield value, step
        if isinstance(value[step], (dict, list)):
            yield from places(value[step], depth + 1)


@st.composite
def files_with_a_value(draw):
    """A kind and a valid file of it with any value in the place of the file, a puzzle, pair, grid, row or cell."""
    kind = draw(st.sampled_from(KINDS))
    document = valid_documents(kind, np.random.default_rng(draw(st.sampled_from(SEEDS))))
    root = [document]
    container, step = draw(st.sampled_from(list(places(root))))
    how = draw(st.sampled_from(("value", "value", "value", "remove", "name", "twice")))
    if how == "name" and isinstance(container, dict):
        container[draw(NAMES)] = container.pop(step)
    elif how == "remove" and container is not root:
        del container[step]
    elif how == "twice" and isinstance(container, list) and container is not root:
        container *= draw(st.sampled_from((2, 40)))
    else:
        container[step] = draw(VALUES)
    text = json.dumps(root[0], **draw(st.sampled_from(STYLES)))
    return kind, text.replace(json.dumps(RAW), draw(st.sampled_from(RAW_TEXTS))).encode()


@fuzzed("values")
@given(files_with_a_value())
def test_any_value_in_any_place_of_a_file_is_read_or_refused_by_name(drawn):
    kind, content = drawn
    check_quick_scan(content)
    check_loading(kind, content)


@pytest.mark.parametrize("kind", KINDS)
def test_the_documents_that_are_damaged_are_valid_ones(kind, tmp_path):
    for seed in SEEDS:
        place = tmp_path / str(seed)
        place.mkdir()
        content = json.dumps(valid_documents(kind, np.random.default_rng(seed))).encode()
        assert len(load(kind, content, place)[1]().keys)
    if kind in ("pairs", "rearc"):
        compact = json.dumps(valid_documents(kind, np.random.default_rng(0)), separators=(",", ":")).encode()
        assert scan_pairs(compact) is not None  # else the quick scan would not be tested at all
        assert parse_task_file(compact, Path("x.json"))[3][1] == -1


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

SOLVED = ArcDataset(
    {"p": {"train": [{"input": [[1]], "output": [[2]]}] * 3, "test": [{"input": [[1]]}]}},
    {"p": [[[1, 2, 3], [4, 5, 6]]]},
)
PERMUTATIONS = st.permutations("0123456789").map(lambda digits: "perm" + "".join(digits))
TRANSFORMS = st.lists(st.sampled_from(("tp", "rt", "ex1-0", "ex0")) | PERMUTATIONS, max_size=4)
KEYS = st.none() | st.builds(
    lambda name, transforms: ".".join([name, *transforms]), st.sampled_from(("p_0", "p_1", "p", "q_0")), TRANSFORMS
)
ENDS = st.sampled_from((None, "\n<|eot_id|>", "<|eot_id|>", "$"))


def expected_rows(text, lines_sep, reply_end):
    """The rows of a text that is a grid, else None: the rule of `decode`, written as a regular expression."""
    trailing = f"(?:{re.escape(lines_sep)})?"
    if reply_end is not None:
        if reply_end not in text:
            return None
        text = text[: text.index(reply_end)]
        trailing = "" if reply_end.startswith(lines_sep) else trailing
    matched = re.fullmatch(f"((?:[0-9]{{1,30}}{re.escape(lines_sep)}){{0,29}}[0-9]{{1,30}}){trailing}", text)
    rows = matched[1].split(lines_sep) if matched else []
    return rows if rows and len({len(row) for row in rows}) == 1 else None


def check_decoding(text, lines_sep, key, reply_end):
    """`decode` gives a grid exactly where the rule says so, and that grid is written as the text that it came from."""
    found, correct, info = SOLVED.decode(text, lines_sep, key=key, reply_end=reply_end)
    rows = expected_rows(text, lines_sep, reply_end)
    assert (found is not None) == (rows is not None), (text, info)
    if found is None:
        assert correct is False and info.startswith("cant_decode: ")
        return
    assert is_grid(found)
    transforms = key.split(".")[1:] if key else []
    assert SOLVED.fmt_array(found, lines_sep, tf=transforms) == lines_sep.join(rows)
    right = key is not None and key.startswith("p_0") and found.tolist() == [[1, 2, 3], [4, 5, 6]]
    known = key is not None and key.startswith("p_0")
    assert correct is (right if known else None)
    assert (info == "ALL_CORRECT") == right


@fuzzed("any_text")
@given(st.text() | st.text(alphabet="0123456789\n", max_size=80), st.sampled_from(("\n", "|", "\r\n")), KEYS, ENDS)
def test_any_text_is_decoded_to_a_grid_or_to_nothing(text, lines_sep, key, reply_end):
    check_decoding(text, lines_sep, key, reply_end)


# Digits of other scripts, signs that int() takes, all kinds of line ends and spaces, and pieces of the format.
JUNK = [
    "", "\n", "\n\n", "\r", "\r\n", " ", "\t", "\v", "\f", "\x1c", "\x85", "\u2028", "\0", "\ufeff", "\u200b", "\ud800",
    "١", "²", "１", "₁", "①", "Ⅷ", "+", "-", "_", ".", ",", "x", "O", "I", "\n+/-=O", "<|eot_id|>", "\n<|eot_id|>", "$",
    "0", "1" * 31, "1\n" * 31, "1" * 5000,
]  # fmt: skip


@st.composite
def near_grids(draw):
    """Text of a grid, or of two, with some junk put in, rows cut or doubled, and perhaps an end."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = ["".join(map(str, row)) for row in rng.integers(0, 10, size=rng.choice([1, 2, 3, 29, 30, 31], size=2))]
    if draw(st.booleans()):
        rows = ["123", "456"]
    how = draw(st.sampled_from(("whole", "ragged", "double", "empty row", "junk", "junk", "two grids")))
    at = draw(st.integers(0, len(rows) - 1))
    if how == "ragged":
        rows[at] = rows[at][: draw(st.integers(0, len(rows[at])))]
    elif how == "double":
        rows[at] *= 2
    elif how == "empty row":
        rows.insert(at, "")
    text = draw(st.sampled_from(("\n", "\n", "\r\n", "|"))).join(rows)
    if how == "junk":
        for _ in range(draw(st.integers(1, 2))):
            place = draw(st.integers(0, len(text)))
            text = text[:place] + draw(st.sampled_from(JUNK)) + text[place + draw(st.integers(0, 1)) :]
    elif how == "two grids":
        text += draw(st.sampled_from(JUNK)) + text
    end = draw(st.sampled_from(("", "\n", "<|eot_id|>", "\n<|eot_id|>", "\n\n<|eot_id|>", "$", "\n<|eot_id|>12\n34")))
    return text + end


@fuzzed("near_grids")
@given(near_grids(), st.sampled_from(("\n", "\n", "\n", "|", "\r\n")), KEYS, ENDS)
def test_what_is_nearly_a_grid_is_decoded_strictly(text, lines_sep, key, reply_end):
    check_decoding(text, lines_sep, key, reply_end)
