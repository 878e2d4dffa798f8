"""Stage 3's reward: what pays, what does not, and that it reads completion ids."""

import functools

import numpy as np
import pytest
from test_collator import character_tokenizer

from arc_loader import ArcDataset
from train_grpo import judge_reply
from training_tools import reward_functions

END = "$"
PUZZLE = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1, 2], [3, 4]]}]}
DATASET = ArcDataset(
    challenge={
        "a": {k: [{n: np.array(g, dtype=np.uint8) for n, g in pair.items()} for pair in v] for k, v in PUZZLE.items()}
    },
    solutions={"a": [np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)]},
)


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
    verdict = judge_reply(DATASET, key, reply, reply_end="\n" + END)
    assert verdict.reward == pytest.approx(reward)
    assert verdict.exact is exact


def test_weights_are_settings():
    assert judge_reply(DATASET, "a_0", "123\n456\n$", reply_end="\n$", reward_exact=5).reward == 5
    assert judge_reply(DATASET, "a_0", "123\n455\n$", reply_end="\n$", reward_cells=0).reward == 0


def test_rewards_read_the_ids_and_not_the_decoded_text():
    tokenizer = character_tokenizer()
    judge = functools.partial(judge_reply, DATASET, reply_end="\n" + END, reward_exact=2.0)
    rewards, exact = reward_functions(judge, tokenizer)
    ids = tokenizer(["123\n456\n$", "123\n456\n", "123\n455\n$"], add_special_tokens=False)["input_ids"]
    # trl's decoded completions have lost the end: they must not matter.
    arguments = {"completion_ids": ids, "key": ["a_0"] * 3, "completions": ["123\n456\n"] * 3, "prompts": [""] * 3}
    assert rewards(**arguments) == pytest.approx([2.0, 0.0, 0.1 * 5 / 6])
    assert exact(**arguments) == [1.0, 0.0, 0.0]
