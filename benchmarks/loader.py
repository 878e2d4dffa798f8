"""The loader against a plain one (json and string joins, written below), timed in the same run on one core.

    python benchmarks/loader.py --dataset_dir dataset

Load: json.load of every file and puzzles of 7 pairs as lists, against ArcDataset.load_from_local_json without a cache
and with one. Each load runs in a process of its own; memory is its peak beyond the interpreter with numpy and all
modules imported.
Samples: freshly augmented views, as text for the plain loader, as token ids for ours; some are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.text import format_options

EOS = "<|eot_id|>"
FORMAT = format_options(EOS)
VIEWS = {"tp": "all", "rt": "all", "perm": True, "shfl_ex": True}


# ---------------------------------------------------------------------------------------------------------------------
# The plain loader: what one writes first


def plain_load(folder: str, size: int = 6, seed: int = 42) -> list[list[dict]]:
    """Puzzles as lists of `size + 1` pairs, each pair a dict of lists of lists."""
    rng, puzzles = random.Random(seed), []
    for file in sorted(Path(folder).glob("*.json")):
        with open(file) as stream:
            pairs = json.load(stream)
        rng.shuffle(pairs)
        puzzles += [pairs[i : i + size + 1] for i in range(0, len(pairs) - size, size + 1)]
    return puzzles


def plain_text(puzzle: list[dict], symmetry: int, colours: list[int], order: list[int]) -> str:
    """Text of a view of a puzzle; `symmetry` counts as tp and rt "all" do."""

    def rows(grid: list[list[int]]) -> str:
        if symmetry % 2:
            grid = [list(row) for row in zip(*grid, strict=True)]
        for _ in range(symmetry // 2):
            grid = [list(row) for row in zip(*grid, strict=True)][::-1]
        return FORMAT["lines_sep"].join("".join(str(colours[cell]) for cell in row) for row in grid)

    text = FORMAT["preprompt"]
    for pair in [*(puzzle[i] for i in order), puzzle[-1]]:
        text += (
            FORMAT["query_beg"] + rows(pair["input"]) + FORMAT["reply_beg"] + rows(pair["output"]) + FORMAT["reply_end"]
        )
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(which: str, folder: str) -> dict[str, float]:
    """Load once; seconds and peak bytes beyond what was there before."""
    before, begin = peak_bytes(), time.perf_counter()
    data = plain_load(folder) if which == "plain" else ArcDataset.load_from_local_json(folder)
    return {"seconds": time.perf_counter() - begin, "bytes": peak_bytes() - before, "puzzles": len(data)}


def load_in_a_process(which: str, folder: str, cache: str, repeats: int) -> dict[str, float]:
    """The quickest of several loads, each in a new process; memory is the largest."""
    command = [sys.executable, __file__, "--dataset_dir", folder, "--load", which]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(
            command, env={**os.environ, "ARC_LOADER_CACHE": cache}, check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout))
    return {**min(runs, key=lambda run: run["seconds"]), "bytes": max(run["bytes"] for run in runs)}


def rate(make: Callable[[int], int], seconds: float) -> float:
    """Samples a second: `make(i)` makes batch i and says how many samples it had."""
    make(0)
    begin, batch, done = time.perf_counter(), 1, 0
    while time.perf_counter() - begin < seconds:
        done += make(batch)
        batch += 1
    return done / (time.perf_counter() - begin)


def one_token_per_cell_tokenizer():
    """A tokenizer of single characters, as a cut vocabulary gives it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = sorted({c for part in FORMAT.values() for c in part.replace(EOS, "")} | set("0123456789"))
    vocabulary = {token: i for i, token in enumerate([*characters, "<|begin_of_text|>", EOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\n|[^\n\d]+"), "isolated")
    begin = ("<|begin_of_text|>", vocabulary["<|begin_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin[0], eos_token=EOS)


def compare(ds: ArcDataset, samples: TrainingSamples, tokenizer, count: int) -> int:
    """Compare ids with the tokenizer's own on both loaders' texts; how many were compared.

    Raises:
        ValueError: they differ.
    """
    chosen = np.random.default_rng(1).choice(len(samples), min(count, len(samples)), replace=False).tolist()
    for index, row in zip(chosen, samples.__getitems__(chosen), strict=True):
        name, colours, order = row["key"].split(".")[0], row["key"].split(".perm")[1][:10], row["key"].split(".ex")[1]
        puzzle = ds.challenge[ds.get_base_key(name)]
        test = {**puzzle["test"][0], "output": ds.solutions[ds.get_base_key(name)][0]}
        pairs = [{part: grid.tolist() for part, grid in pair.items()} for pair in [*puzzle["train"], test]]
        order = [int(i) for i in order.split("-")]
        text = plain_text(pairs, index % 8, [int(c) for c in colours], order)
        if (
            text != ds.fmt_task(row["key"], **FORMAT)["text"]
            or row["input_ids"].tolist() != tokenizer(text)["input_ids"]
        ):
            raise ValueError(f"{row['key']}: the ids are not those of the tokenizer on the plain loader's text")
    return len(chosen)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", default="dataset", help="folder of task files")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each rate of samples is measured")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind, of which the quickest counts")
    parser.add_argument("--batch", type=int, default=128, help="samples of one batch")
    parser.add_argument("--compare", type=int, default=500, help="samples that are compared")
    parser.add_argument("--load", choices=["plain", "ours"], help=argparse.SUPPRESS)  # the child process
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # one core
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.load:
        print(json.dumps(measure_load(arguments.load, arguments.dataset_dir)))
        return

    loads = {"plain": load_in_a_process("plain", arguments.dataset_dir, "off", arguments.repeats)}
    loads["ours, no cache"] = load_in_a_process("ours", arguments.dataset_dir, "off", arguments.repeats)
    with tempfile.TemporaryDirectory() as cache:
        load_in_a_process("ours", arguments.dataset_dir, cache, 1)  # writes it
        loads["ours, cached"] = load_in_a_process("ours", arguments.dataset_dir, cache, arguments.repeats)
    print(f"{'load':<16}{'puzzles':>9}{'seconds':>9}{'speed':>8}{'peak MB':>9}")
    for name, run in loads.items():
        speed = loads["plain"]["seconds"] / run["seconds"]
        print(f"{name:<16}{run['puzzles']:>9,}{run['seconds']:>9.3f}{speed:>7.1f}x{run['bytes'] / 1e6:>9.0f}")

    ds, tokenizer = ArcDataset.load_from_local_json(arguments.dataset_dir), one_token_per_cell_tokenizer()
    encoder = SampleEncoder(tokenizer, **FORMAT)
    begin = time.perf_counter()
    samples = TrainingSamples(ds, encoder, 100_000, seed=42, **VIEWS)
    start_up = time.perf_counter() - begin
    puzzles, rng = plain_load(arguments.dataset_dir), random.Random(0)

    def plain_batch(_: int) -> int:
        for _ in range(arguments.batch):
            size = rng.randrange(len(puzzles))
            order = rng.sample(range(len(puzzles[size]) - 1), len(puzzles[size]) - 1)
            plain_text(puzzles[size], rng.randrange(8), rng.sample(range(10), 10), order)
        return arguments.batch

    order = np.random.default_rng(0).permutation(len(samples))

    def rows(batch: int) -> list[int]:
        places = np.arange(batch * arguments.batch, (batch + 1) * arguments.batch)
        epochs, places = places // len(order), places % len(order)
        return (epochs * len(order) + order[places]).tolist()

    plain = rate(plain_batch, arguments.seconds)
    ours = rate(lambda batch: len(samples.__getitems__(rows(batch))), arguments.seconds)
    single = rate(lambda batch: len([samples[row] for row in rows(batch)]), arguments.seconds / 2)

    def tokenized(batch: int) -> int:
        texts = [ds.fmt_task(row["key"], **FORMAT)["text"] for row in samples.__getitems__(rows(batch)[:32])]
        return len(tokenizer(texts)["input_ids"])

    slow = rate(tokenized, arguments.seconds / 2)
    mean = samples.lengths().mean()
    print(f"\n{'samples':<44}{'a second':>10}{'ratio':>8}   (mean {mean:.0f} tokens)")
    for name, value in (
        ("plain, text only", plain),
        ("ours, text, then the tokenizer", slow),
        ("ours, ids, one by one", single),
        (f"ours, ids, batches of {arguments.batch}", ours),
    ):
        print(f"{name:<44}{value:>10,.0f}{value / plain:>7.1f}x")
    compared = compare(ds, samples, tokenizer, arguments.compare)
    print(
        f"\n{compared:,} samples: ids equal the tokenizer's on the plain loader's text; start-up check {start_up:.2f} s"
    )


if __name__ == "__main__":
    main()
