"""More folders to train on: what is taken of them, and that they give away nothing of what is held out."""

import json
from dataclasses import replace

import numpy as np
import pytest

from arc.puzzles import splits
from arc.puzzles.leaks import find_leaks
from arc.training import data
from base_finetune import Settings

TASKS, PAIRS = 5, 21  # of the dataset


def grid(rng):
    return rng.integers(0, 10, size=(3, 4))


def write(folder, tasks):
    """Task files: of each name a list of (input, output)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in tasks.items():
        listed = [{"input": np.asarray(a).tolist(), "output": np.asarray(b).tolist()} for a, b in pairs]
        (folder / f"{name}.json").write_text(json.dumps(listed), encoding="utf-8")
    return str(folder)


@pytest.fixture
def settings(tmp_path):
    """Settings of a dataset of five tasks: one of them, and two puzzles of the others, are held out."""
    rng = np.random.default_rng(0)
    tasks = {f"task{n}": [(grid(rng), grid(rng)) for _ in range(PAIRS)] for n in range(TASKS)}
    folder = write(tmp_path / "dataset", tasks)
    return Settings(dataset_dir=folder, sizes=[2], holdout_examples=2, holdout_tasks=1)


def extended(settings, *folders):
    return splits.load_split(replace(settings, extra_dataset_dirs=list(folders)))


def test_extra_puzzles_are_trained_on_and_nothing_of_them_is_held_out(settings, tmp_path, capsys):
    rng = np.random.default_rng(1)
    one = write(tmp_path / "one", {"more": [(grid(rng), grid(rng)) for _ in range(7)]})  # two puzzles of three pairs
    two = write(tmp_path / "two", {f"rule-{n}": [(grid(rng), grid(rng)) for _ in range(3)] for n in range(4)})
    before, after = splits.load_split(settings), extended(settings, one, two)
    assert after.train.keys[: len(before.train.keys)] == before.train.keys
    more = after.train.keys[len(before.train.keys) :]
    tasks = sorted(after.train.task_of(key) for key in more)
    assert tasks == ["more", "more", "rule-0", "rule-1", "rule-2", "rule-3"]
    assert (after.seen.keys, after.unseen.keys) == (before.seen.keys, before.unseen.keys)
    assert after.train.content_hash() != before.train.content_hash()
    printed = capsys.readouterr().out
    assert f"{one}: 2 puzzles more to train on" in printed and f"{two}: 4 puzzles more to train on" in printed
    assert "held-out test pair" not in printed


def test_n_counts_the_datasets_own_puzzles(settings, tmp_path):
    rng = np.random.default_rng(1)
    folder = write(tmp_path / "more", {"more": [(grid(rng), grid(rng)) for _ in range(9)]})
    split = extended(replace(settings, n=4), folder)
    assert [split.train.task_of(key) == "more" for key in split.train.keys] == [False] * 4 + [True] * 3


def test_what_would_give_an_answer_away_is_left_out(settings, tmp_path, capsys):
    split = splits.load_split(settings)
    unseen_task = split.unseen.task_of(split.unseen.keys[0])
    rng, colours = np.random.default_rng(2), np.random.default_rng(3).permutation(10)

    def dressed(ds):
        """A held-out test pair, turned and recoloured."""
        puzzle = ds.get_base_key(ds.keys[0])
        query, reply = ds.challenge[puzzle]["test"][0]["input"], ds.solutions[puzzle][0]
        return colours[np.rot90(query)], colours[np.rot90(reply)]

    def pairs(count):
        return [(grid(rng), grid(rng)) for _ in range(count)]

    folder = write(
        tmp_path / "more",
        {
            "good": pairs(3),
            "seen-answer": [*pairs(1), dressed(split.seen), *pairs(1)],
            "unseen-answer": [*pairs(2), dressed(split.unseen)],
            unseen_task: pairs(3),
        },
    )
    after = extended(settings, folder)
    more = after.train.keys[len(split.train.keys) :]
    assert [after.train.task_of(key) for key in more] == ["good"]
    for heldout in (after.seen, after.unseen):
        assert find_leaks(heldout, after.train.select_puzzles(map(after.train.get_base_key, more))) == ({}, {})
    printed = capsys.readouterr().out
    assert f"{folder}: 1 puzzles more to train on" in printed
    assert "left out: 1 puzzles of tasks that are held out, and 2 with a held-out test pair" in printed


def test_a_puzzle_that_the_dataset_has_too_is_an_error(settings, tmp_path):
    split = splits.load_split(settings)
    for number, ds in enumerate((split.train, split.seen)):
        puzzle = ds.get_base_key(ds.keys[0])
        rng = np.random.default_rng(number)
        pairs = [{"input": grid(rng).tolist(), "output": grid(rng).tolist()} for _ in range(3)]
        official = {"train": pairs[:2], "test": pairs[2:]}
        folder = tmp_path / f"more{number}"
        folder.mkdir()
        (folder / f"{puzzle}.json").write_text(json.dumps(official), encoding="utf-8")
        with pytest.raises(
            ValueError, match=f"{folder}: .* has a puzzle '{puzzle}' too: expected tasks of other names"
        ):
            extended(settings, str(folder))
    with pytest.raises(ValueError, match="has a puzzle 'task.*' too"):
        extended(settings, settings.dataset_dir)


def test_a_folder_that_is_given_twice_is_an_error(settings, tmp_path):
    rng = np.random.default_rng(5)
    folder = write(tmp_path / "more", {"more": [(grid(rng), grid(rng)) for _ in range(3)]})
    with pytest.raises(ValueError, match=f"--extra_dataset_dirs {folder} {folder}: puzzle 'more-000' is there already"):
        extended(settings, folder, folder)


def test_what_no_puzzle_is_made_of_is_counted(settings, tmp_path, capsys):
    rng = np.random.default_rng(6)
    folder = write(tmp_path / "more", {"more": [(grid(rng), grid(rng)) for _ in range(8)]})
    extended(settings, folder)
    assert f"left out: 2 pairs that fill no puzzle\n{folder}: 2 puzzles more" in capsys.readouterr().out


def test_an_evaluation_looks_for_leaks_in_the_extra_folders_too(settings, tmp_path):
    import evaluate_arc
    from arc.evaluation.puzzles import load_puzzles
    from arc.runs.settings import find_problems

    rng = np.random.default_rng(7)
    pairs = [{"input": grid(rng).tolist(), "output": grid(rng).tolist()} for _ in range(3)]
    folder = write(tmp_path / "more", {"more": [(pair["input"], pair["output"]) for pair in pairs]})
    queries = {"train": pairs[:2], "test": [{"input": pairs[2]["input"]}]}
    (tmp_path / "challenges.json").write_text(json.dumps({"other": queries}), encoding="utf-8")
    (tmp_path / "solutions.json").write_text(json.dumps({"other": [pairs[2]["output"]]}), encoding="utf-8")
    asked = evaluate_arc.Settings(
        models=["any"], challenges=str(tmp_path / "challenges.json"), solutions=str(tmp_path / "solutions.json"),
        dataset_dir=settings.dataset_dir, sizes=[2], holdout_examples=2, holdout_tasks=1,
    )  # fmt: skip
    assert load_puzzles(asked).leaked == {}
    assert load_puzzles(replace(asked, extra_dataset_dirs=[folder])).leaked == {"other": ("more-000",)}
    alone = replace(asked, dataset_dir=None, extra_dataset_dirs=[folder])
    assert "nothing, without --dataset_dir" in "\n".join(find_problems(alone))


def test_a_folder_that_is_missing_is_named(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="--extra_dataset_dirs: .*nowhere: no such folder"):
        extended(settings, str(tmp_path / "nowhere"))


def test_what_is_measured_on_needs_no_extra_folder(settings, tmp_path):
    """A merge is proven on held-out puzzles, also where the extra folders are gone."""
    from tests.tiny_models import byte_level_tokenizer

    settings = replace(settings, extra_dataset_dirs=[str(tmp_path / "gone")])
    heldout, _ = data.heldout_puzzles(settings, byte_level_tokenizer())
    assert len(heldout.keys) == 2
