"""Scores against ones worked out by hand."""

import json
import tracemalloc

import numpy as np
import pytest

from arc.evaluation.scores import bootstrap_interval, mean_interval, rule_table, score_table, wilson_interval
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.text import cell_accuracy


def answer(correct, *, greedy=False, found=None, shape=True, cells=1.0, probability=0.5, sure=0.5, rules=None):
    return {
        "correct": correct, "greedy_correct": greedy, "decodable": True, "right_shape": shape, "cell_accuracy": cells,
        "prob_truth": probability, "prob_greedy": sure, "found": any(correct) if found is None else found,
        "rules": rules or {"product": correct, "max": correct[::-1]},
    }  # fmt: skip


@pytest.fixture
def puzzles():
    """Puzzle a has two test inputs, b one; c has no solution."""
    grid = [[1]]
    first = {
        "a_0": answer([True, False], greedy=True, cells=1.0, probability=0.5, sure=0.75),
        "a_1": answer([False, False], shape=False, cells=0.0, probability=0.0),
        "b_0": answer([False, True], cells=0.25, probability=0.25, found=True),
    }
    second = {
        "a_0": answer([True]),
        "a_1": answer([False, True]),
        "b_0": answer([], shape=False, cells=0.0, probability=0.1, found=True),
    }
    entries = {
        key: {"puzzle": key[0], "solution": grid, "one": first[key], "two": second[key]}
        for key in ("a_0", "a_1", "b_0")
    }
    entries["c_0"] = {"puzzle": "c", "solution": None, "one": {"correct": None}, "two": {"correct": None}}
    return entries


def test_table(puzzles):
    one, two = score_table(["one", "two"], puzzles, {"one": 1.25, "two": 2})
    assert (one["model"], one["n"], one["puzzles"]) == ("one", 3, 2)
    assert one["exact_1"] == pytest.approx(1 / 3)
    assert one["exact_2"] == pytest.approx(2 / 3)
    assert one["greedy"] == pytest.approx(1 / 3)
    assert one["score"] == pytest.approx((0.5 + 1) / 2)  # half of puzzle a, all of b
    assert one["right_shape"] == pytest.approx(2 / 3)
    assert one["cell_accuracy"] == pytest.approx(1.25 / 3)
    assert one["prob_truth"] == pytest.approx(0.25)
    assert one["prob_greedy"] == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert one["gained"] is one["lost"] is one["change"] is None
    assert one["exact_2_interval"] == pytest.approx(wilson_interval(2, 3))
    assert two["exact_1"] == pytest.approx(1 / 3)
    assert two["exact_2"] == pytest.approx(2 / 3)
    assert two["score"] == pytest.approx((1 + 0) / 2)
    assert two["found"] == pytest.approx(1)
    assert (two["gained"], two["lost"], two["change"]) == (["a_1"], ["b_0"], 0)
    assert two["change_interval"][0] <= 0 <= two["change_interval"][1]
    assert one["seconds"] == 1.2


def test_rules(puzzles):
    one, two = rule_table(["one", "two"], puzzles, ["product", "max"])
    assert one == {
        "model": "one", "n": 3, "found": pytest.approx(2 / 3),
        "product": {"exact_1": pytest.approx(1 / 3), "exact_2": pytest.approx(2 / 3)},
        "max": {"exact_1": pytest.approx(1 / 3), "exact_2": pytest.approx(2 / 3)},
    }  # fmt: skip
    assert two["max"]["exact_1"] == pytest.approx(2 / 3)


def test_without_solutions(puzzles):
    bare = {"c_0": puzzles["c_0"]}
    [row] = score_table(["one"], bare, {})
    assert row["n"] == 0
    assert row["exact_1"] is row["exact_1_interval"] is row["score"] is row["change"] is None
    assert rule_table(["one"], bare, ["max"]) == [
        {"model": "one", "n": 0, "found": None, "max": {"exact_1": None, "exact_2": None}}
    ]


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # By hand from Wilson's formula, z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson(count, n, low, high):
    assert wilson_interval(count, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap():
    assert bootstrap_interval([0.3] * 5) == pytest.approx([0.3, 0.3])
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)  # 0.5 -+ 1.96 * 0.5 / sqrt(400)
    # What comes in groups of ten alike is worth a tenth.
    values, groups = [float(i // 10 % 2) for i in range(400)], [str(i // 10) for i in range(400)]
    low, high = bootstrap_interval(values, groups)
    assert (low, high) == pytest.approx((0.345, 0.655), abs=0.02)  # 0.5 -+ 1.96 * 0.5 / sqrt(40)
    assert bootstrap_interval(values, groups) == bootstrap_interval(values, groups)
    assert bootstrap_interval([]) == [0, 1]


def test_what_does_not_vary_is_not_certain():
    assert mean_interval([0.0] * 10, list("abcdefghij")) == pytest.approx([0, 0.2775], abs=5e-5)  # Wilson's, 0 of 10
    assert mean_interval([0.0] * 20, list("abcdefghij") * 2) == pytest.approx([0, 0.2775], abs=5e-5)  # of 10 puzzles
    assert mean_interval([1.0] * 10, list("abcdefghij")) == pytest.approx([0.7225, 1], abs=5e-5)
    assert mean_interval([0.0] * 10, list("abcdefghij"), least=-1) == pytest.approx([-0.2775, 0.2775], abs=5e-5)
    varied = [0.0, 1.0] * 20
    assert mean_interval(varied, list(map(str, range(40)))) == bootstrap_interval(varied)


def test_an_interval_of_many_puzzles_takes_little_memory():
    values = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    low, high = bootstrap_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < values.mean() < high
    assert peak < 100e6


def test_cell_accuracy():
    solution = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    assert cell_accuracy(solution, solution) == 1
    assert cell_accuracy(np.array([[1, 2], [3, 0]]), solution) == 0.75
    assert cell_accuracy(solution.T[:1], solution) == 0
    assert cell_accuracy(None, solution) == 0


def test_the_competitions_score_of_a_hand_made_submission(tmp_path):
    train = [{"input": [[0]], "output": [[1]]}]
    puzzles = {
        "aa": {"train": train, "test": [{"input": [[5]]}, {"input": [[6]]}]},
        "bb": {"train": train, "test": [{"input": [[7]]}]},
    }
    (tmp_path / "c.json").write_text(json.dumps(puzzles))
    (tmp_path / "s.json").write_text('{"aa": [[[1, 2]], [[3]]], "bb": [[[4], [4]]]}')
    ds = ArcDataset.load_from_json(tmp_path / "c.json").load_solutions(tmp_path / "s.json")
    submission = {
        "aa": [{"attempt_1": [[9]], "attempt_2": [[1, 2]]}, {"attempt_1": [[1, 2]], "attempt_2": [[0]]}],
        "bb": [{"attempt_1": [[4, 4]], "attempt_2": [[4], [4]]}],
    }
    assert ds.validate_submission(submission) == 0.5 + 1
    entries = {
        key: {"puzzle": key[:2], "solution": [[0]], "model": answer(correct)}
        for key, correct in {"aa_0": [False, True], "aa_1": [False, False], "bb_0": [False, True]}.items()
    }
    assert score_table(["model"], entries, {})[0]["score"] * 2 == ds.validate_submission(submission)
