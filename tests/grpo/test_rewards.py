"""Stage 3's rewards: what pays, what does not, and that they read completion ids."""

import doctest
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arc.grpo import rewards as rewards_module
from arc.grpo.rewards import COMPONENTS, component_weights, judge_components, repetition, reward_functions
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.text import format_options
from arc.runs.settings import find_problems
from tests.models.test_collator import character_tokenizer
from train_grpo import Settings

END = "$"
PUZZLE = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1, 2], [3, 4]]}]}
DATASET = ArcDataset(
    challenge={
        "a": {k: [{n: np.array(g, dtype=np.uint8) for n, g in pair.items()} for pair in v] for k, v in PUZZLE.items()}
    },
    solutions={"a": [np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)]},
)


def reward_of(key, reply, **rewards):
    """What a reply earns in all: as trl adds up the reward functions."""
    components = judge_components(DATASET, key, reply, reply_end="\n" + END)
    return sum(w * c for w, c in zip(component_weights(**rewards), components, strict=True))


@pytest.mark.parametrize(
    ("key", "reply", "reward", "exact"),
    [
        ("a_0", "123\n456\n$", 1.0, True),
        ("a_0.tp", "14\n25\n36\n$", 1.0, True),  # the view's own orientation
        ("a_0.tp", "123\n456\n$", 0.0, False),  # right before the transform, wrong for this view
        ("a_0.perm1023456789", "023\n456\n$", 1.0, True),
        ("a_0", "123\n455\n$", 0.1 * 5 / 6, False),
        ("a_0", "000\n000\n$", 0.0, False),
        ("a_0", "12\n45\n$", 0.0, False),  # another shape
        ("a_0", "123\n456\n", 0.0, False),  # no end: cut off
        ("a_0", "123\n456", 0.0, False),
        ("a_0", "", 0.0, False),
        ("a_0", "$", 0.0, False),
        ("a_0", "123\n45\n$", 0.0, False),  # ragged
        ("a_0", "1x3\n456\n$", 0.0, False),
        ("a_0", "junk123\nmore456 text\n$", 0.0, False),
        ("a_0", "123\n\n456\n$", 0.0, False),
        ("a_0", "123\n456\n\n$", 0.0, False),
        ("a_0", " 123\n456\n$", 0.0, False),
        ("a_0", "123\n456\n$123\n456\n$", 1.0, True),  # what follows the first end is never read
        ("a_0", "000\n000\n$123\n456\n$", 0.0, False),
        ("a_0", "١٢٣\n٤٥٦\n$", 0.0, False),  # digits of another script
        ("a_0", "123\n456\n" * 20, 0.0, False),
    ],
)
def test_what_a_reply_earns(key, reply, reward, exact):
    assert reward_of(key, reply) == pytest.approx(reward)
    assert judge_components(DATASET, key, reply, reply_end="\n" + END).exact_match == exact


def test_weights_are_settings():
    assert reward_of("a_0", "123\n456\n$", reward_exact=5) == 5
    assert reward_of("a_0", "123\n455\n$", reward_cells=0) == 0


ALL = {"reward_exact": 1.0, "reward_cells": 0.3, "reward_shape": 0.2, "reward_format": 0.1}


@pytest.mark.parametrize(
    ("reply", "components", "reward"),
    [
        ("123\n456\n$", (1, 1, 1, 1), 1.0),  # all of it, not 1.0 and the others besides
        ("123\n455\n$", (0, 5 / 6, 1, 1), 0.3 * 5 / 6 + 0.2 + 0.1),
        ("000\n000\n$", (0, 0, 1, 1), 0.2 + 0.1),
        ("12\n45\n$", (0, 0, 0, 1), 0.1),
        ("14\n25\n36\n$", (0, 0, 0, 1), 0.1),  # the transposed shape
        ("123\n45\n$", (0, 0, 0, 0), 0.0),
        ("123\n456\n", (0, 0, 0, 0), 0.0),
    ],
)
def test_components_and_what_they_pay(reply, components, reward):
    assert judge_components(DATASET, "a_0", reply, reply_end="\n$") == pytest.approx(components)
    assert reward_of("a_0", reply, **ALL) == pytest.approx(reward)


MALFORMED = [
    "", "$", "\n", "\n$", "\n\n$",
    "123\n456", "123\n456\n", "123\n456$",  # cut off: without an end, or with half of it
    "123\n456\n\n$", "\n123\n456\n$", "123\n\n456\n$",
    "123\n45\n$", "123\n4567\n$", "1\n23\n456\n$",  # ragged
    "123 \n456\n$", " 123\n456\n$", "1 2 3\n4 5 6\n$", "123\r\n456\r\n$", "\t123\n456\n$",
    "1x3\n456\n$", "junk123\nmore456\n$", "O123\n456\n$", "123\n456 is the answer\n$", "-12\n456\n$", "1.3\n456\n$",
    "123\n456\n\n123\n456\n$", "123\n456\n+/-=O123\n456\n$", "123\n456 123\n456\n$",  # two grids
    "123\n456\n" * 20 + "$", "123\n" * 31 + "\n$", "1" * 31 + "\n$",  # endless rows, and long ones
    "123\n" * 5000, "1" * 5000,
    "١٢٣\n٤٥٦\n$", "１２３\n４５６\n$", "①②③\n④⑤⑥\n$", "123\n45²\n$", "123\n45\u0665\n$",  # other digits
    "123\u200b\n456\n$", "\ufeff123\n456\n$", "123\x00\n456\n$", "123\u2028456\n$", "123\x0b456\n$",
]  # fmt: skip


@pytest.mark.parametrize("reply", MALFORMED, ids=lambda reply: ascii(reply[:24]))
def test_malformed_text_earns_nothing_whatever_the_weights(reply):
    for key in ("a_0", "a_0.tp", "a_0.rt.rt.perm1023456789"):
        assert judge_components(DATASET, key, reply, reply_end="\n" + END) == (0, 0, 0, 0)
        assert reward_of(key, reply, **ALL) == 0


@pytest.mark.parametrize("after", ["123\n456\n$", "junk", "\n", "$", "١"])
def test_what_follows_the_end_neither_pays_nor_costs(after):
    for reply in ("123\n456\n$", "123\n455\n$", "000\n000\n$", "1x\n$"):
        judged = judge_components(DATASET, "a_0", reply, reply_end="\n$")
        assert judge_components(DATASET, "a_0", reply + after, reply_end="\n$") == judged


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789\n$ x٣²", max_size=40))
@example("\n\n$")  # rows without cells
@example("1" * 30 + "\n$")
@example("1" * 31 + "\n$")  # wider than any grid
def test_only_rows_of_digits_that_end_earn_anything(reply):
    components = judge_components(DATASET, "a_0", reply, reply_end="\n$")
    assert list(components) == sorted(components)  # each includes the one before it
    body, end, _ = reply.partition("\n$")
    rows = body.split("\n")
    same_length = len({len(row) for row in rows}) == 1 and 1 <= len(rows[0]) <= 30 and len(rows) <= 30
    is_grid = bool(end) and same_length and set("".join(rows)) <= set("0123456789")
    assert components.well_formed == is_grid


def test_no_wrong_reply_earns_what_the_exact_one_does():
    for exact, cells, shape, form in itertools.product((0.5, 1.0, 3.0), (0, 0.1), (0, 0.2), (0, 0.15)):
        rewards = {"reward_exact": exact, "reward_cells": cells, "reward_shape": shape, "reward_format": form}
        assert not Settings(base_model="x", **rewards).problems()
        best = reward_of("a_0", "123\n456\n$", **rewards)
        assert best == pytest.approx(exact)
        for reply in ("123\n455\n$", "000\n000\n$", "12\n45\n$", "x\n$"):
            assert 0 <= reward_of("a_0", reply, **rewards) < best
        assert component_weights(**rewards)[0] > 0


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        ({"reward_shape": 0.9}, ["reward_cells", "reward_shape"]),  # 0.1 + 0.9: as much as the exact grid
        ({"reward_cells": 0.0, "reward_shape": 0.5, "reward_format": 0.5}, ["reward_shape", "reward_format"]),
        ({"reward_cells": 1.0}, ["reward_cells"]),
        ({"reward_format": -0.1}, ["reward_format"]),
        ({"reward_shape": float("nan")}, ["reward_cells", "reward_shape"]),
        ({"reward_exact": float("inf")}, ["reward_exact"]),
        ({"reward_exact": 0.0, "reward_cells": 0.0}, ["reward_exact"]),
    ],
)
def test_weights_that_could_pay_for_wrong_grids_are_refused(rewards, named):
    problems = find_problems(Settings(base_model="x", **rewards))
    assert [problem.split()[0] for problem in problems] == named or sorted(p.split()[0] for p in problems) == sorted(
        named
    )


def test_defaults_of_settings_and_functions_agree():
    assert component_weights(**Settings().rewards) == component_weights() == pytest.approx([0.9, 0.1, 0.0, 0.0])


def test_rewards_read_the_ids_and_not_the_decoded_text():
    tokenizer = character_tokenizer()
    text_format = format_options(END) | {"reply_end": "\n" + END}
    functions = reward_functions(DATASET, tokenizer, text_format)
    assert tuple(function.__name__ for function in functions) == COMPONENTS  # trl logs them by these
    ids = tokenizer(["123\n456\n$", "123\n456\n", "123\n455\n$"], add_special_tokens=False)["input_ids"]
    logged = {}
    # trl's decoded completions have lost the end: they must not matter.
    arguments = {"completion_ids": ids, "key": ["a_0"] * 3, "completions": ["123\n456\n"] * 3, "prompts": [""] * 3}
    found = [function(**arguments, log_metric=logged.__setitem__) for function in functions]
    assert found == [[1, 0, 0], pytest.approx([1, 0, 5 / 6]), [1, 0, 1], [1, 0, 1]]
    weights = component_weights(reward_exact=2.0)
    paid = [sum(w * f[i] for w, f in zip(weights, found, strict=True)) for i in range(3)]
    assert paid == pytest.approx([2.0, 0.0, 0.1 * 5 / 6])
    assert set(logged) == {"completions/repetition", "completions/repetition_excess"}
    assert logged["completions/repetition_excess"] == 0  # no more than the solution's own


def test_repetition_is_told_from_what_grids_repeat_anyway():
    assert doctest.testmod(rewards_module).failed == 0
    assert repetition("") == repetition("123") == repetition("1234567890") == 0
    assert repetition("0" * 104) == 1 - 1 / 101
    tokenizer, logged = character_tokenizer(), {}
    exact = reward_functions(DATASET, tokenizer, format_options(END) | {"reply_end": "\n" + END})[0]
    ids = tokenizer(["123\n" * 30, "123\n456\n$"], add_special_tokens=False)["input_ids"]
    exact(completion_ids=ids, key=["a_0"] * 2, log_metric=logged.__setitem__)
    assert logged["completions/repetition_excess"] == pytest.approx((1 - 4 / 117) / 2)
