"""The benchmark of scale on tiny shapes: rows differ in what they say, several processes are measured as one."""

import json

import pytest

from tests.helpers import run


def test_rows_are_measured_and_written(tmp_path):
    results = tmp_path / "scale.json"
    flags = (
        "benchmarks/scale.py", "--output_dir", tmp_path / "output", "--start_model", "tiny", "--models",
        "--start_tokens", 128, "--start_lora_r", 8, "--tokens_per_step", 2560, "--tokens_per_pass", 1280,
        "--steps", 4, "--warm_up", 2, "--flags", "--engine transformers --gradient_checkpointing false",
        "--results", results,
    )  # fmt: skip
    printed = run(*flags, "--tokens", 640, "--gpus", 2, "--lora_r")
    record = json.loads(results.read_text(encoding="utf-8"))
    assert record["command"].startswith("python benchmarks/scale.py --output_dir") and record["versions"]["torch"]
    start, long, two = record["rows"]
    assert [row["name"] for row in record["rows"]] == ["start", "tokens 640", "gpus 2"]
    assert (start["gpus"], two["gpus"], start["model"], start["lora_r"]) == (1, 2, "tiny", 8)
    assert 100 < start["tokens_per_sample"] == two["tokens_per_sample"] <= 128 < 400 < long["tokens_per_sample"] <= 640
    assert (start["samples_per_step"], long["samples_per_step"]) == (20, 4)
    for row in record["rows"]:
        # All processes' tokens: a step has as many whoever computes it.
        tokens = row["tokens_per_s"] * row["step_ms"] / 1000
        assert tokens == pytest.approx(row["samples_per_step"] * row["tokens_per_sample"], rel=0.1)
        took = pytest.approx(4 * row["step_ms"] / 1000, rel=0.02, abs=0.01)  # written with two decimals
        assert row["estimated_s"] > 0 and row["took_s"] == took
    assert "| gpus 2 | 2 |" in printed and results.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    run(*flags, "--add", "--tokens", "--gpus", "--lora_r", 4)
    added = json.loads(results.read_text(encoding="utf-8"))
    assert added["rows"][:3] == record["rows"] and added["command"] == record["command"]
    assert [(row["run"], row["name"]) for row in added["rows"][3:]] == [(2, "start"), (2, "lora_r 4")]
    assert "--add" in added["runs"][1]["command"]
