"""The benchmark of inference on a tiny model: its plain search and ours find the same, in float32 to the last reply."""

import json

from tests.helpers import run
from tests.tiny_models import prepared_base


def benchmark(folder, dataset, *flags):
    results = folder / "inference.json"
    printed = run(
        "benchmarks/inference.py", "--model", prepared_base(folder), "--dataset_dir", dataset, "--holdout_examples", 8,
        "--puzzles", 2, "--warmup", 1, "--views", 4, "--rows", 8, "--dtype", "float32", "--results", results, *flags,
    )  # fmt: skip
    return json.loads(results.read_text(encoding="utf-8")), printed


def test_both_searches_find_the_same_replies(tmp_path, demo_dataset):
    result, printed = benchmark(tmp_path, demo_dataset, "--peaked", "--plain_guess", "both", "--batch_size", 3)
    assert len(result["search"]["agreement"]) == 2, "with guesses and without"
    for agreement in result["search"]["agreement"].values():
        assert agreement["in_both"] >= 8, "each of the 8 views has its imposed replies"
        assert agreement["only_plain"] == agreement["only_ours"] == []
        assert 0 < agreement["largest_difference"] < 1e-4, "0: the model itself would have no part in it"
    ours, guessed, alone = result["search"]["rows"]
    assert ours["passes"] < guessed["passes"] < alone["passes"]
    assert [row["identical"] for row in result["greedy"]] == [1.0, 1.0]
    assert all(row["largest_difference"] < 1e-4 for row in result["scoring"])
    assert "the answers are imposed" in printed


def test_a_search_that_finds_nothing_says_so(tmp_path, demo_dataset):
    result, printed = benchmark(tmp_path, demo_dataset, "--parts", "search")
    assert [row["replies"] for row in result["search"]["rows"]] == [0, 0]
    assert "NO REPLY REACHES min_prob" in printed
