"""How time and memory of stage 1 grow with GPUs, tokens a sample, the model's shape and LoRA's rank.

    python benchmarks/scale.py --output_dir output-scale

One configuration is measured as it is (--start_...: one GPU, 1,024 tokens, the 1B shape, r 512), then with one thing
changed at a time: --gpus, --tokens, --models, --lora_r. Rows of one number of GPUs run one after the other in one
process, or in those that torchrun starts. Models have random weights, in the shape of --models; --base_model FOLDER
takes that one instead, in all rows. Puzzles are made so that all samples are nearly as long as --tokens says.

All rows have --tokens_per_step tokens a step and at most --tokens_per_pass in a forward pass on one GPU, so that one
GPU is as full as several are. tokens_per_s is of all GPUs together, over the steps after --warm_up; peak_gib is of the
GPU that needed most. estimated_s is what the stage would have said before that its steps take; took_s is what they take
at the pace after the warm-up; startup_s is from the row's begin to its first step. Writes
benchmarks/results/scale.json after each row, and a plot beside it; with --add to what stands there already, as a run
of its own, whose ratios are to its own first row. --gpus counts processes where there is no CUDA; --flags are those of
stage 1 in all rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from train import FLAGS, Clock, machine, make_stage_1, watch_steps  # noqa: E402 - benchmarks/train.py

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
LARGE, SMALL = 10, 3  # sides of the grids; small ones where a pair of large ones does not fit twice
PREPROMPT = 50  # tokens before the first pair, BOS included
TASKS, PAIRS = 8, 160  # tasks of the generated dataset, and pairs of each


@dataclass(frozen=True)
class Configuration:
    """What one row measures.

    Args:
        name: what differs from the first row.
        gpus: processes, each with a GPU of its own where there is CUDA.
        tokens: of a sample, at most.
        model: one of SHAPES, or a folder.
        lora_r: rank.
    """

    name: str
    gpus: int
    tokens: int
    model: str
    lora_r: int


def configurations(args: argparse.Namespace) -> list[Configuration]:
    """The rows: the start, then one thing changed at a time."""
    model = args.base_model or args.start_model
    start = Configuration("start", args.start_gpus, args.start_tokens, model, args.start_lora_r)
    rows = [start]
    models = [] if args.base_model else args.models
    for field, values in (("gpus", args.gpus), ("tokens", args.tokens), ("model", models), ("lora_r", args.lora_r)):
        changed = [value for value in values if value != getattr(start, field)]
        rows += [replace(start, name=f"{field} {value}", **{field: value}) for value in dict.fromkeys(changed)]
    return rows


def side_of(tokens: int) -> int:
    """The side of the grids for samples of so many tokens."""
    return LARGE if tokens >= PREPROMPT + 2 * tokens_of_pair(LARGE) else SMALL


def tokens_of_pair(side: int) -> int:
    """Tokens of a pair of square grids: one for each cell, line break, mark and end."""
    return 2 * (side * side + side - 1) + 9


def batch_of(tokens: int, args: argparse.Namespace) -> tuple[int, int]:
    """Samples of a forward pass and forward passes of a step on one GPU, for samples of so many tokens."""
    passes = max(1, args.tokens_per_step // args.tokens_per_pass)
    return max(1, args.tokens_per_pass // tokens), passes


def make_dataset(folder: Path, side: int) -> None:
    """Tasks of random square grids and their mirror images, in the course's format; none if the folder is there."""
    if folder.exists():
        return
    rng = np.random.default_rng(side)
    beside = folder.with_name(f"{folder.name}.incomplete")
    beside.mkdir(parents=True, exist_ok=True)
    for task in range(TASKS):
        grids = rng.integers(0, 10, size=(PAIRS, side, side))
        pairs = [{"input": grid.tolist(), "output": grid[:, ::-1].tolist()} for grid in grids]
        (beside / f"mirror-{task}.json").write_text(json.dumps(pairs), encoding="utf-8")
    beside.rename(folder)


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A tied Llama with random weights and a small tokenizer like Llama 3's; none if the folder is there.

    The stage cuts the vocabulary to one token for each cell anyway, so that a small one makes no difference.
    """
    if folder.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from demo.make_base import build_tokenizer

    tokenizer = build_tokenizer(512, seed=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    beside = folder.with_name(f"{folder.name}.incomplete")
    model.save_pretrained(beside)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def run_row(row: Configuration, args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps of stage 1 and measure them; of several processes each does, and gets the figures of all."""
    from arc.runs.processes import divide_batch, gather

    begin = time.perf_counter()
    size, passes = batch_of(row.tokens, args)
    side = side_of(row.tokens)
    pairs = max(2, (row.tokens - PREPROMPT) // tokens_of_pair(side))
    model = args.base_model or args.output_dir / f"model-{row.model}"
    flags = {
        "base_model": model, "dataset_dir": args.output_dir / f"mirror-{side}",
        "output_dir": args.output_dir / f"stage-{Path(row.model).name}", "max_steps": args.steps, "eval_steps": 0,
        "save_steps": 0, "lora_r": row.lora_r, "max_seq_length": row.tokens, "sizes": pairs - 1, "holdout_examples": 4,
        "per_device_train_batch_size": size, "gradient_accumulation_steps": passes,
        "micro_batch_size": divide_batch(size, passes, row.gpus)[0], "dataloader_num_workers": 0,  # alike in all rows
    }  # fmt: skip
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    run, data, trainer = make_stage_1([*given, *shlex.split(args.flags)])
    mean = float(data.samples.lengths().mean())
    startup = time.perf_counter() - begin
    clock = Clock()
    watch_steps(trainer, clock)
    trainer.args.logging_nan_inf_filter = False  # as in a run of the stage, see arc.runs.guard
    trainer.train()
    parts = gather(clock.result(row.name, args.warm_up))  # each counts its own tokens
    step = max(part["step_ms"] for part in parts)
    peaks = [part["peak_gib"] for part in parts if part["peak_gib"] is not None]
    return {
        "name": row.name,
        "gpus": row.gpus,
        "tokens_per_sample": round(mean, 1),
        "model": Path(row.model).name,
        "lora_r": row.lora_r,
        "tokens_per_s": round(sum(part["tokens_per_s"] for part in parts), 1),
        "step_ms": step,
        "peak_gib": max(peaks, default=None),
        "estimated_s": round(run.plan.seconds_per_step * args.steps, 2),  # as the stage says it before
        "took_s": round(step * args.steps / 1000, 2),
        "startup_s": round(startup, 1),
        "samples_per_step": size * passes,
    }


def run_rows(rows: Sequence[Configuration], args: argparse.Namespace) -> None:
    """Measure rows one after the other in this process, and print each."""
    import torch

    for row in rows:
        print("\nRESULT " + json.dumps(run_row(row, args)), flush=True)
        torch._dynamo.reset()  # code compiled for one model would count against the limit of the next
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table, ratios to the first row of each run."""
    print("\n| run | row | GPUs | tokens a sample | model | r | tokens/s | to the first | step, ms | peak GiB a GPU | "
          "estimated to took |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        first = next(other for other in rows if other["run"] == row["run"])
        print(
            f"| {row['run']} | {row['name']} | {row['gpus']} | {row['tokens_per_sample']:,.0f} | {row['model']} | "
            f"{row['lora_r']} | {row['tokens_per_s']:,.0f} | {row['tokens_per_s'] / first['tokens_per_s']:.2f} x | "
            f"{row['step_ms']:,.1f} | {row['peak_gib']} | {row['estimated_s'] / row['took_s']:.2f} |"
        )


def plot_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed and memory over each of the things that were changed, from the run with most rows of it, the last such."""
    from matplotlib.figure import Figure

    panels = [("gpus", "GPUs"), ("tokens_per_sample", "tokens a sample"), ("model", "model"), ("lora_r", "r")]
    panels = [(name, title) for name, title in panels if len({row[name] for row in rows}) > 1]
    if not panels:
        return
    figure = Figure(figsize=(3 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (name, title), (speed, memory) in zip(panels, axes.T, strict=True):
        others = [other for other in ("gpus", "tokens_per_sample", "model", "lora_r") if other != name]
        runs = [[row for row in rows if row["run"] == run] for run in dict.fromkeys(row["run"] for row in rows)]
        runs = [[row for row in run if all(row[other] == run[0][other] for other in others)] for run in runs]
        chosen = max(reversed(runs), key=len)
        if name != "model":
            chosen.sort(key=lambda row, name=name: row[name])
        values = [str(row[name]) if name == "model" else f"{row[name]:,.0f}" for row in chosen]
        speed.plot(values, [row["tokens_per_s"] for row in chosen], "o-")
        memory.plot(values, [row["peak_gib"] or float("nan") for row in chosen], "o-", color="tab:orange")
        memory.set_xlabel(title)
        for axis in (speed, memory):
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("tokens/s, all GPUs")
    axes[1, 0].set_ylabel("peak GiB of a GPU")
    figure.savefig(path, dpi=130)


def launch(rows: Sequence[Configuration]) -> Iterator[dict[str, Any]]:
    """Measure rows of one number of GPUs in processes of their own; of one that fails the last lines are printed."""
    rows = list(rows)
    while rows:
        command = [sys.executable]
        if rows[0].gpus > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(rows[0].gpus), "--"]
        command += [str(Path(__file__).resolve()), *sys.argv[1:], "--rows", json.dumps([asdict(row) for row in rows])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: list[str] = []
        done: set[str] = set()  # each of several processes prints each row
        for line in process.stdout:
            if not line.startswith("RESULT "):
                lines.append(line)
                continue
            found = json.loads(line[7:])
            if found["name"] not in done:
                done.add(found["name"])
                print(f"{found['name']}: {found['tokens_per_s']:,.0f} tokens/s", flush=True)
                yield found
        process.wait()
        rows = [row for row in rows if row.name not in done]
        if rows:
            print(f"== {rows[0].name}\n" + "".join(lines[-40:]))
            rows = rows[1:]


def make_files(row: Configuration, args: argparse.Namespace) -> None:
    """The puzzles and the model of a row, if they are not there."""
    make_dataset(args.output_dir / f"mirror-{side_of(row.tokens)}", side_of(row.tokens))
    if not args.base_model:
        make_model(args.output_dir / f"model-{row.model}", SHAPES[row.model])


def main() -> None:
    """Run the rows, print and write the results."""
    args = parse_flags()
    if args.rows:
        run_rows([Configuration(**row) for row in json.loads(args.rows)], args)
        return
    from arc.runs.artifacts import versions

    wanted = configurations(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]])
    runs: list[dict[str, Any]] = []  # the command and versions of each
    rows: list[dict[str, Any]] = []
    if args.add and args.results.is_file():
        before = json.loads(args.results.read_text(encoding="utf-8"))
        runs, rows = before["runs"], before["rows"]
    runs.append({"machine": machine(), "versions": versions(), "command": command})
    earlier = len(rows)
    for gpus in dict.fromkeys(row.gpus for row in wanted):
        together = [row for row in wanted if row.gpus == gpus]
        for row in together:
            make_files(row, args)
        for found in launch(together):
            rows.append({"run": len(runs), **found})  # what is measured stays, whatever becomes of the next row
            record = {**runs[0], "runs": runs, "rows": rows}
            args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if len(rows) == earlier:
        sys.exit("error: no row came to its end")
    print_rows(rows)
    plot_rows(rows, args.results.with_suffix(".png"))
    print(f"{machine()}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(args.results)
    if len(rows) - earlier < len(wanted):
        sys.exit(1)


def parse_flags() -> argparse.Namespace:
    """The command's flags; exits with 2 for values that cannot be."""
    import torch

    there = max(1, torch.cuda.device_count())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", help="a model folder for all rows, instead of random weights")
    parser.add_argument("--output_dir", type=Path, default=Path("output-scale"))
    parser.add_argument("--start_gpus", type=int, default=1)
    parser.add_argument("--start_tokens", type=int, default=1024)
    parser.add_argument("--start_model", choices=SHAPES, default="1B")
    parser.add_argument("--start_lora_r", type=int, default=512)
    parser.add_argument("--gpus", type=int, nargs="*", default=[count for count in (2, 4) if count <= there])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 4096, 8192])
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["3B"])
    parser.add_argument("--lora_r", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--tokens_per_step", type=int, default=32768)
    parser.add_argument("--tokens_per_pass", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm_up", type=int, default=15, help="steps that are not timed")
    parser.add_argument("--flags", default=shlex.join(FLAGS["transformers"]), help="of stage 1, as one string")
    parser.add_argument("--add", action="store_true", help="add to the results that are there")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scale.json")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # in the processes that measure
    args = parser.parse_args()
    if not 1 <= args.warm_up < args.steps:
        parser.error("--warm_up has to be from 1 to below --steps")
    least = PREPROMPT + 2 * tokens_of_pair(SMALL)
    if min([args.start_tokens, *args.tokens]) < least:
        parser.error(f"a sample of two pairs has {least} tokens: --tokens and --start_tokens have to be from that")
    if args.tokens_per_step % args.tokens_per_pass:
        parser.error("--tokens_per_pass has to divide --tokens_per_step")
    return args


if __name__ == "__main__":
    main()
